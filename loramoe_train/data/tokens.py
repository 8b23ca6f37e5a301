"""Text -> token ids with a loss mask, cut to a maximal length.

The boundary between prompt and answer is a token boundary, and the prompt's tokens are exactly the tokens of the prompt
alone, because that is what the model sees when it is evaluated. The answer's tokens are what the tokenizer adds when
prompt and answer are encoded together (as lm-eval does it); if encoding together would merge across the boundary, the
answer is encoded on its own, which is how generation continues a prompt.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from loramoe_train.data.templates import Rendered, Segment
from loramoe_train.errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenised example of T tokens. The first token never carries loss: nothing predicts it."""

    name: str  # "task:split:row", row counted from 0 in its file
    task: int  # index into the mixture's tasks
    domain: int  # index into the mixture's domains
    ids: np.ndarray  # (T,) int32
    supervised: np.ndarray  # (T,) bool
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Encoded:
    """Token ids of one text with their loss mask; `answer_start` is where the part begins that truncation keeps."""

    ids: list[int]
    supervised: list[bool]
    truncated: bool


class Encoder:
    """Encodes rendered examples for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer; it needs an end-of-sequence token.
        max_length: tokens per example, the end-of-sequence token included.
        supervise: "answer" (the supervised segments carry loss) or "all" (every token does).
    """

    def __init__(self, tokenizer: Any, *, max_length: int, supervise: str = "answer") -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError("the model's tokenizer has no end-of-sequence token, so the end cannot be learned")
        self._tokenizer, self._max_length, self._all = tokenizer, max_length, supervise == "all"
        self.eos: int = tokenizer.eos_token_id
        self.prefix: list[int] = self._special_prefix()

    def __call__(self, rendered: Rendered, where: str) -> Encoded:
        """Token ids and loss mask. Raises DataError naming `where` (file:line) if no token would carry loss."""
        ids, supervised = self._encode(rendered)
        self._supervise_ends(ids, supervised)
        start = supervised.index(True) if True in supervised else 0
        if self._all:
            supervised = [True] * len(ids)
        ids, supervised, truncated = self._truncate(ids, supervised, start)
        if supervised:
            supervised[0] = False
        if not any(supervised):
            raise DataError(f"{where}: no token of this example carries loss; its answer has no token to learn")
        return Encoded(ids, supervised, truncated)

    def _encode(self, rendered: Rendered) -> tuple[list[int], list[bool]]:
        if rendered.encoded is not None:
            ids, supervised = list(rendered.encoded[0]), list(rendered.encoded[1])
        else:
            ids, supervised = self._encode_segments(rendered.segments, special=rendered.special)
        if not rendered.special:
            # a chat template may have closed the conversation; the newline that it adds after that is never produced
            end = len(ids)
            while end and ids[end - 1] != self.eos and not self._tokenizer.decode([ids[end - 1]]).strip():
                end -= 1
            if end and ids[end - 1] == self.eos:
                return ids[:end], supervised[:end]
        return [*ids, self.eos], [*supervised, any(supervised)]  # an end of nothing is nothing to learn

    def _encode_segments(self, segments: tuple[Segment, ...], *, special: bool) -> tuple[list[int], list[bool]]:
        text = "".join(segment.text for segment in segments)
        bos = self._tokenizer.bos_token
        # a prompt that begins with the token in writing must not get a second one (lm-eval does the same)
        ids = list(self.prefix) if special and not (bos and text.startswith(bos)) else []
        supervised = [False] * len(ids)
        before, context = "", []  # text and tokens of the segments so far
        for segment in segments:
            added, context = self._continue(before, context, segment.text)
            ids += added
            supervised += [segment.supervised] * len(added)
            before += segment.text
        return ids, supervised

    def _plain(self, text: str) -> list[int]:
        # not verbose: a text that is too long is cut and counted here, transformers need not warn about it
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def _continue(self, before: str, context: list[int], text: str) -> tuple[list[int], list[int]]:
        """(the tokens that `text` adds after `before`, the tokens of both encoded together)."""
        whole = self._plain(before + text)
        if whole[: len(context)] == context:
            return whole[len(context) :], whole
        # Merged across the boundary. On its own the text may get a word-begin mark that it does not have here
        # (SentencePiece), so encode it behind a newline, if the two can be told apart.
        line, behind = self._plain("\n"), self._plain("\n" + text)
        return (behind[len(line) :] if behind[: len(line)] == line else self._plain(text)), whole

    def _special_prefix(self) -> list[int]:
        """What the tokenizer puts before a text (a begin-of-sequence token, or nothing)."""
        plain = self._plain("a")
        special = self._tokenizer.encode("a")
        for start in range(len(special) - len(plain) + 1):
            if special[start : start + len(plain)] == plain:
                return special[:start]
        return []

    def _supervise_ends(self, ids: list[int], supervised: list[bool]) -> None:
        """An end-of-sequence token right after supervised text is learned too, in every turn."""
        for position in range(1, len(ids)):
            if ids[position] == self.eos and supervised[position - 1]:
                supervised[position] = True

    def _truncate(self, ids: list[int], supervised: list[bool], start: int) -> tuple[list[int], list[bool], bool]:
        """Cut what stands before `start` from its left (special prefix kept), and only then the end."""
        excess = len(ids) - self._max_length
        if excess <= 0:
            return ids, supervised, False
        prefix = len(self.prefix) if ids[: len(self.prefix)] == self.prefix else 0
        prefix = min(prefix, start, self._max_length - 1)
        # one token of context stays, for the first token of the answer must be predicted from something
        context = start if prefix else max(start - 1, 0)
        cut = min(excess, max(context - prefix, 0))
        ids = ids[:prefix] + ids[prefix + cut :]
        supervised = supervised[:prefix] + supervised[prefix + cut :]
        return ids[: self._max_length], supervised[: self._max_length], True
