"""The frozen base model: its files, its facts, its tokenizer, and where experts can go.

Names are imported on first use, so that the facts of config.json can be read without torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "num_layers": "architecture",
    "max_positions": "architecture",
    "read_architecture": "architecture",
    "NeededFile": "files",
    "files_needed": "files",
    "model_folder": "files",
    "base_identity": "identity",
    "check_same_base": "identity",
    "load_model": "loading",
    "meta_model": "loading",
    "original_weights": "loading",
    "check_sites": "sites",
    "count_layers": "sites",
    "find_sites": "sites",
    "load_tokenizer": "tokenizer",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
