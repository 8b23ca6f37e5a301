"""A paper's table through a real SLURM: submitted once, looked at meanwhile, gone on with by the same call."""

import json
from pathlib import Path

import pytest

from tests.forks import run_forked
from tests.sweeps.slurm import LONG, ask, wait_until

TABLE = ("lora_mixer_table2", "methods=lora,lora_mixer", "seeds=0")
CALL = (
    *TABLE, "launcher=slurm", "launcher.gpus_per_node=0", "launcher.array_parallelism=1", "trainer.max_steps=4",
    "eval.limit=4",
)  # fmt: skip


@pytest.mark.nightly
def test_the_same_call_submits_looks_and_retries(cluster: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "reproduce" / "lora_mixer_table2" / "tiny"

    def call(*given: str, **environment: str) -> tuple[str, str]:
        done = run_forked("reproduce", *given, "format=csv", cwd=tmp_path, **environment, **cluster)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    def look() -> str:
        return call(*TABLE, "run=false")[0]

    def jobs() -> list[list[str]]:
        runs = json.loads((folder / "sweep-1" / "sweep.json").read_text())["runs"]
        return [[job["id"] for job in run["jobs"]] for run in runs]

    table, said = call(*CALL, SLOW="0:5")
    assert "2 runs submitted as job" in said and "sweep-1/tiny/lora_mixer/all/0 waiting" in table
    first = jobs()
    wait_until(lambda: "sweep-1/tiny/lora/all/0 running" in look(), look, timeout=LONG)
    table, said = call(*CALL)  # nothing is submitted twice
    assert "2 runs: 0 done, 2 running or waiting, 0 failed, 0 to start" in said and jobs() == first
    ask(cluster, "scancel", first[1][0])
    assert "sweep-1/tiny/lora_mixer/all/0 failed: CANCELLED: its job never began" in look()

    table, said = call(*CALL, "launcher.timeout_min=90")  # the cancelled one again, no other, and with more time
    assert "1 failed, 0 to start" in said and "1 run submitted as job" in said
    assert jobs()[0] == first[0] and len(jobs()[1]) == 2
    assert "TimeLimit=01:30:00" in ask(cluster, "scontrol", "show", "job", jobs()[1][-1])
    wait_until(lambda: len(list(folder.glob("sweep-1/*/*/*/*/results.json"))) == 2, look, timeout=LONG)
    both = jobs()
    table, said = call(*CALL)
    assert "2 runs: 2 done, 0 failed, 0 to start" in said and jobs() == both
    assert [path.name for path in folder.iterdir()] == ["sweep-1"]
    assert "running" not in table and "sweep-1/tiny/lora_mixer/all/0" in table
    assert table == look()
