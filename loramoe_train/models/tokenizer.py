"""The tokenizer of the base model, with a padding token that is not the end-of-sequence token.

Many base models pad with their end token. Masks in this program are explicit, so that would be harmless here, but not
in everything downstream that still derives a mask from token ids. The vocabulary is never extended: a new token would
need a new embedding row, and the base is frozen.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from loramoe_train.errors import ConfigError, DataError, MissingFileError
from loramoe_train.models.architecture import read_architecture
from loramoe_train.models.files import TOKENIZER_FILES, fetch_command, model_folder, offline
from loramoe_train.schema.model import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# tokens that model makers set aside, in order of preference; taken only if the vocabulary has them already
PADS = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|padding|>", "<|reserved_special_token_0|>")


def load_tokenizer(config: ModelConfig) -> "PreTrainedTokenizerBase":
    """The tokenizer, padding on the right, with a padding token other than the end token where the vocabulary has one.

    What was chosen is logged at INFO. Raises MissingFileError (no tokenizer files), DataError (damaged, without an
    end-of-sequence token, or with ids beyond the model's embedding).
    """
    from transformers import AutoTokenizer

    source = model_folder(config)
    if isinstance(source, Path) and config.gguf_file is None:
        if not any((source / name).is_file() for name in TOKENIZER_FILES):
            if config.path is None and offline():
                raise MissingFileError(
                    f"{config.name}: its tokenizer is not in the hub cache; fetch it with: {fetch_command(config)}"
                )
            if config.path is not None or "/" not in config.name:
                raise MissingFileError(f"{source} lacks a tokenizer: none of {', '.join(TOKENIZER_FILES)}")
            source = config.name
    extra = {"gguf_file": config.gguf_file} if config.gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source,
            revision=config.revision,
            padding_side="right",
            trust_remote_code=config.trust_remote_code,
            **extra,
        )
    except Exception as error:  # the tokenizers library raises bare Exceptions for a damaged file
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if isinstance(error, ImportError):
            raise ConfigError(f"the tokenizer of {source} needs another package: {reason}") from error
        if isinstance(error, OSError) and not isinstance(source, Path):  # not found, gated, no connection
            raise MissingFileError(f"the tokenizer of {source} cannot be fetched: {reason}") from error
        raise DataError(f"the tokenizer in {source} cannot be read: {reason}") from error
    tokenizer.padding_side = "right"
    _check_vocabulary(tokenizer, config, str(source))
    _choose_pad(tokenizer)
    return tokenizer


def _check_vocabulary(tokenizer: "PreTrainedTokenizerBase", config: ModelConfig, source: str) -> None:
    if tokenizer.eos_token_id is None:
        raise DataError(f"the tokenizer in {source} has no end-of-sequence token; set eos_token in its config")
    architecture = read_architecture(config)
    rows = architecture.get("vocab_size")
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if isinstance(rows, int) and largest >= rows:
        raise DataError(
            f"the tokenizer in {source} has token ids up to {largest}, but the model embeds {rows} tokens;"
            " they do not belong together"
        )


def _choose_pad(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Set `pad_token` to an existing token that is not the end token; the end token itself only where none is left."""
    before, end = tokenizer.pad_token, tokenizer.eos_token
    if before is not None and before != end:
        return
    vocabulary = tokenizer.get_vocab()
    candidates = [*(name for name in PADS if name in vocabulary), tokenizer.unk_token, tokenizer.bos_token]
    pad = next((token for token in candidates if token is not None and token != end), end)
    tokenizer.pad_token = pad
    why = "there was none" if before is None else "it was the end token"
    if pad == end:
        logger.info("padding with the end token %r: the vocabulary has no other token to spare", pad)
    else:
        logger.info("padding with %r (id %d), because %s", pad, tokenizer.pad_token_id, why)
