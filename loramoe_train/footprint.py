"""How much memory a run will take, by component, without a single weight: parameters counted on the meta device, saved
activations counted by running the routed model on fake tensors (they have shapes and no storage).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loramoe_train.routing.context import RoutingContext
from loramoe_train.routing.types import Tokens

MakeModel = Callable[[], tuple[nn.Module, RoutingContext]]

BYTES = {"float32": 4.0, "bfloat16": 2.0}
QUANTIZED = {"nf4": 0.5 + 4 / 64, "int8": 1.0}  # bytes per weight: nf4 keeps one float32 scale per 64 weights
PROBE_TOKENS = (16, 48)  # activations are linear in tokens (attention does not keep its square)
LOSS_CHUNK_ROWS = 1024  # rows of logits that exist at a time


@dataclass(frozen=True)
class Memory:
    """Bytes by component; their sum is a lower bound of the peak, without fragmentation and kernels' workspaces."""

    base: int
    experts_and_routers: int
    gradients: int
    optimizer: int
    activations: int | None  # None: this model cannot be probed
    logits: int

    def rows(self) -> list[tuple[str, int | None]]:
        """(label, bytes) of every component, then the total of what is known."""
        parts = [
            ("base model", self.base),
            ("experts and routers (float32)", self.experts_and_routers),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("saved activations", self.activations),
            ("logits at a time, with gradient", self.logits),
        ]
        return [*parts, ("total", sum(size or 0 for _, size in parts))]


def count(parameters: Iterable[nn.Parameter]) -> int:
    """Number of scalars, each parameter once (tied weights)."""
    return sum({id(p): p.numel() for p in parameters}.values())


def base_bytes(model: nn.Module, dtype: str, quantization: str) -> int:
    """Bytes of the frozen base; quantisation covers linear layers except the output head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
    per_linear = QUANTIZED.get(quantization, BYTES[dtype])
    unique = {id(p): p for p in model.parameters()}
    return int(sum(p.numel() * (per_linear if key in linear else BYTES[dtype]) for key, p in unique.items()))


def memory(
    base: int, trained: int, held: int, optimizer: str, activations: int | None, *, rows: int, vocabulary: int
) -> Memory:
    """Put the components together. `trained`: scalars that train; `held`: those of experts and routers; `rows`: of
    logits that exist at a time."""
    per_state = 2 if optimizer == "adamw_8bit" else 8
    logits = 2 * 4 * vocabulary * rows
    return Memory(base, 4 * held, 4 * trained, per_state * trained, activations, logits)


def saved_activations(make_model: MakeModel, *, batch: int, sequence: int, checkpointed: bool) -> int | None:
    """Bytes that one forward pass keeps for backward, without the LM head; None where fake tensors do not reach.

    `make_model()` returns (routed model in training mode, its context) and is called inside the fake mode. Two short
    probes give the part that grows with the tokens and the part that does not (experts cast to the base's dtype).
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            model, context = make_model()
            short, long = (_kept_bytes(model, context, length) for length in PROBE_TOKENS)
    except Exception:  # a plan must not fail because some operation of a model has no fake kernel
        return None
    per_token = (long - short) / (PROBE_TOKENS[1] - PROBE_TOKENS[0])
    fixed = max(short - per_token * PROBE_TOKENS[0], 0)
    tokens = batch * sequence
    if checkpointed:  # every layer keeps its input; one layer at a time is run again
        layers = max(model.config.num_hidden_layers, 1)
        embedding = model.get_input_embeddings().weight
        inputs = layers * embedding.shape[1] * embedding.element_size() * tokens
        return int(inputs + (per_token * tokens + fixed) / layers)
    return int(per_token * tokens + fixed)


def _kept_bytes(model: nn.Module, context: RoutingContext, length: int) -> int:
    """Bytes of all tensors saved for backward by a forward pass over `length` tokens, each storage once."""
    own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    alive = []  # a freed storage's address could come back and be counted as the same

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.zeros(length, dtype=torch.long)
    embedding = model.get_input_embeddings().weight
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        context.open(Tokens(ids == 0, ids, ids, ids == 0)),
    ):
        embedded = torch.empty(1, length, embedding.shape[1], dtype=embedding.dtype, requires_grad=True)
        model.base_model(inputs_embeds=embedded, use_cache=False)
    return sum(kept.values())
