"""How much memory a run will take, by component, without a single weight: parameters counted on the meta device, saved
activations counted by running the routed model on fake tensors (they have shapes and no storage).
"""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loramoe_train.routing.types import Tokens

BYTES = {"float32": 4.0, "bfloat16": 2.0}
QUANTIZED = {"nf4": 0.5 + 4 / 64, "int8": 1.0}  # bytes per weight: nf4 keeps one float32 scale per 64 weights
PROBE_TOKENS = 32  # activations are linear in tokens (attention does not keep its square), so a short probe is enough
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
            ("logits of one chunk, with gradient", self.logits),
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
    """Put the components together. `trained` and `held`: scalars of experts and routers; `rows`: supervised tokens."""
    per_state = 2 if optimizer == "adamw_8bit" else 8
    logits = 2 * 4 * vocabulary * min(rows, LOSS_CHUNK_ROWS)
    return Memory(base, 4 * held, 4 * trained, per_state * trained, activations, logits)


def saved_activations(make_model: Any, context_of: Any, *, batch: int, sequence: int, checkpointed: bool) -> int | None:
    """Bytes that one forward pass keeps for backward, without the LM head; None where fake tensors do not reach.

    `make_model()` returns (model, hidden size) and is called inside the fake mode, with routed layers in place.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    length = min(sequence, PROBE_TOKENS)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model, hidden, dtype = make_model()
            own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
            kept: dict[int, int] = {}
            alive = []

            def pack(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in own:
                    kept[storage._cdata] = storage.nbytes()
                    alive.append(tensor)  # a freed storage's address could come back and be counted as one
                return tensor

            ids = torch.zeros(1, length, dtype=torch.long).view(-1)
            facts = Tokens(ids == 0, ids, ids, ids == 0)
            context = context_of(model)
            with (
                torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
                context.open(facts) if context is not None else nullcontext(),
            ):
                embedded = torch.empty(1, length, hidden, dtype=dtype, requires_grad=True)
                model.base_model.train()(inputs_embeds=embedded, use_cache=False)
    except Exception:  # noqa: BLE001  a plan must not fail because a model has an operation without a fake kernel
        return None
    tokens = batch * sequence
    if checkpointed:
        layers = max(getattr(model.config, "num_hidden_layers", 1), 1)
        per_layer = sum(kept.values()) / layers
        return int((per_layer + layers * hidden * dtype.itemsize * length) / length * tokens)
    return int(sum(kept.values()) / length * tokens)
