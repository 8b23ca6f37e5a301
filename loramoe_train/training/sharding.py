"""A frozen base that is shared out among processes (`trainer.parallel=fsdp2`), beside experts that each of them holds.

Every decoder layer's weights are cut into as many parts as there are processes; a layer is put together for its forward
and its backward pass and taken apart again (`torch.distributed.fsdp.fully_shard`, on the processes that Accelerate set
up). What trains is small, so it stays whole on every process, and data parallelism averages its gradients as it does
without sharding: optimizer, clipping, checks, checkpoints and everything that reads a factor know nothing of it.
Embeddings, the last norm and the output layer stay whole, too: the chunked loss asks for the output layer by itself.

**Every forward pass is then a meeting of all processes.** Training steps have equally many micro-batches on each rank
anyway; evaluation must not give one rank more passes than another.
"""

from accelerate import Accelerator
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from loramoe_train.schema.trainer import TrainerConfig
from loramoe_train.training.parts import TrainingParts


def shares(accelerator: Accelerator, trainer: TrainerConfig) -> bool:
    """Whether this run shares its base out; a single process has nobody to share with."""
    return trainer.parallel == "fsdp2" and accelerator.num_processes > 1


def is_shared_out(model: nn.Module) -> bool:
    """Whether every forward pass of a model takes all processes."""
    return hasattr(model, "unshard")  # not by its class, whose import takes most of a second


def shard_base(parts: TrainingParts, accelerator: Accelerator) -> None:
    """Share out the layers of `parts`, in place; once for a run, and a second call changes nothing.

    What the groups of `parts` hold stays whole. On an accelerator each layer is moved there as it is cut, so a model
    that waits in host memory never is on a device as a whole.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    if is_shared_out(parts.model):
        return
    whole = {parameter for members in parts.groups.values() for parameter in members.values()}
    inside = {id(parameter) for layer in parts.layers for parameter in layer.parameters()}
    outside = {parameter for parameter in parts.model.parameters() if id(parameter) not in inside}
    # a group of their own: gathered weights and averaged gradients then need not come in one order on all ranks
    mesh = DeviceMesh.from_group(distributed.new_group(), accelerator.device.type)
    for layer in parts.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    fully_shard(parts.model, mesh=mesh, ignored_params=whole | outside)  # holds no weight: it orders its layers
    parts.model.to(accelerator.device)
    cut = [name for name, parameter in parts.model.named_parameters() if isinstance(parameter, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(parts.model, cut)
