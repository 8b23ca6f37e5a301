"""Group `launcher`: where the runs of a sweep are started, and what each of them is given.

The names are those of Hydra's submitit launcher, whose keys `configs/launcher/slurm.yaml` sets from these.
"""

from typing import Annotated, Literal

from pydantic import Field

from loramoe_train.schema.base import Strict

# They become lines of a shell script: nothing that ends a line or a word
Word = Annotated[str, Field(pattern=r"^[\w.,:;@%+/=*\[\]()&|!-]+$", max_length=200)]
Line = Annotated[str, Field(pattern=r"^[^\r\n\x00]*$")]
Option = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]


class LauncherConfig(Strict):
    """A sweep's runs: `local`, processes of this machine, or `slurm`, one job each of one array."""

    name: Literal["local", "slurm"] = "local"
    array_parallelism: int | None = Field(default=None, gt=0)  # runs at once; null: one per GPU, without GPUs one
    gpus_per_node: int | None = Field(default=None, ge=0)  # of a run; null: slurm is asked for none, local gives one
    tasks_per_node: int | None = Field(default=None, gt=0)  # processes of a run on a node; null: one per GPU
    # what follows is slurm's
    nodes: int = Field(default=1, gt=0)
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    exclude: Word | None = None  # nodes
    gres: Word | None = None
    cpus_per_task: int | None = Field(default=None, gt=0)
    mem_gb: int | None = Field(default=None, gt=0)  # per node
    timeout_min: int = Field(default=60, gt=0)  # minutes that a run may take before it saves and queues again
    signal_delay_s: int = Field(default=120, gt=0)  # seconds before the time limit at which it is told to save
    max_num_timeout: int = Field(default=100, ge=0)  # how often it may queue again for a time limit
    setup: list[Line] = Field(default_factory=list)  # shell lines before the run (only on the command line)
    additional_parameters: dict[Option, Line | int | bool] = Field(default_factory=dict)  # `#SBATCH --KEY=VALUE`; same

    @property
    def processes(self) -> int:
        """Processes of a run on each node: one per GPU."""
        return self.tasks_per_node or max(self.gpus_per_node or 1, 1)
