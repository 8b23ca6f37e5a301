"""Base models with random weights in the shapes of real ones, and the composed config of a mixture over them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# as transformers' LlamaConfig has them; wide and llama3_8b have fewer layers and a smaller head than their models
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": dict(hidden=576, ffn=1536, layers=30, heads=9, kv_heads=3, vocabulary=49152),
    "wide": dict(hidden=2048, ffn=8192, layers=4, heads=32, kv_heads=8, vocabulary=8192),
    "llama3_8b": dict(hidden=4096, ffn=14336, layers=4, heads=32, kv_heads=8, vocabulary=32768),
    "tiny": dict(hidden=64, ffn=128, layers=2, heads=4, kv_heads=2, vocabulary=512),  # for tests of the benchmarks
}


@dataclass(frozen=True)
class Mixture:
    """Experts of every adapted linear layer."""

    experts: int = 8
    rank: int = 8
    top_k: int = 2
    alpha: float = 16.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def active_rank(self) -> int:
        return self.top_k * self.rank

    @property
    def total_rank(self) -> int:
        return self.experts * self.rank


def make_base(shape: str, dtype: torch.dtype, *, layers: int | None = None, device: str = "cpu") -> nn.Module:
    """A frozen Llama of that shape, seeded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=size["vocabulary"],
        hidden_size=size["hidden"],
        intermediate_size=size["ffn"],
        num_hidden_layers=layers or size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"],
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a float32 model made first would be the peak of what is measured
    try:
        return LlamaForCausalLM(config).to(device=device).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def make_tokens(shape: str, rows: int, length: int, *, device: str = "cpu", seed: int = 1) -> Tensor:
    """(rows, length) random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SHAPES[shape]["vocabulary"], (rows, length), generator=generator).to(device)


def routed_config(mixture: Mixture, *overrides: str) -> Any:
    """The composed config of `loramoe-train` for this mixture on q, k, v and o of a Llama."""
    return composed(
        "model=smollm2_135m",
        "experts.sites=[attn_in,attn_out]",
        f"experts.layout={mixture.experts}",
        f"experts.rank={mixture.rank}",
        f"experts.alpha={mixture.alpha}",
        "experts.dropout=0",
        "router=topk",
        f"router.top_k={mixture.top_k}",
        *overrides,
    )


def composed(*overrides: str) -> Any:
    """The checked config that `loramoe-train` would make of these arguments."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from loramoe_train.composition import normalised, register
    from loramoe_train.data.definitions import load_definitions
    from loramoe_train.paths import CONFIGS
    from loramoe_train.validation import validate

    register()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        found = compose("train", normalised(list(overrides)))
    values = OmegaConf.to_container(found, resolve=True, throw_on_missing=True)
    values["data"]["definitions"] = load_definitions(values["data"]["tasks"], [CONFIGS / "data" / "task"])
    return validate(values)
