"""lm-eval's transformers backend on a model that is already in memory: its requests, answered in batches of ours.

Requests, tokenisation, padding, truncation and what is cut off a generated text are lm-eval's; `likelihood.py` and
`generation.py` say how a batch is computed, `batches.py` how large it is.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor, nn

from loramoe_train.errors import DataError
from loramoe_train.evaluation.batches import BatchSize, run_in_batches
from loramoe_train.evaluation.generation import generate
from loramoe_train.evaluation.likelihood import log_likelihoods
from loramoe_train.evaluation.prompts import KnownPrompts
from loramoe_train.evaluation.shared_contexts import SharedContexts
from loramoe_train.evaluation.types import BenchmarkResult, Progress, Side
from loramoe_train.routing.types import Tokens
from loramoe_train.schema.evaluation import EvalConfig

Reading = Callable[[Tokens], AbstractContextManager[Any]]

# Tokens of a pass where no number of rows is given: of likelihoods, of generation (what its cache holds in the end; a
# step reads all weights, so many rows pay). A processor gains nothing from more than 512 to 2,048 at once. For
# accelerators both are estimates.
ON_PROCESSORS = 2048, 16384
ON_ACCELERATORS = 32768, 65536


@dataclass(frozen=True)
class _Prompt:
    number: int  # of the request
    text: str
    length: int  # tokens, with those to come

    rows = 1


class InMemoryModel(HFLM):
    """Answers lm-eval's requests with a model in memory; tells its progress, and counts prompts that were cut."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, config: EvalConfig, accelerator: Any, progress: Progress | None
    ) -> None:
        """`accelerator`: where requests are split over several processes, else None."""
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", max_length=config.max_length)
        # processes that share out one model must make the same passes, and only one of them may be short of memory
        halves = accelerator is not None or not _in_step()
        rows = config.batch_size, config.generation_batch_size
        tokens = ON_PROCESSORS if self.device.type == "cpu" else ON_ACCELERATORS
        self._sizes = [
            BatchSize(tokens=most, halves=halves) if given is None else BatchSize(rows=given, halves=halves)
            for given, most in zip(rows, tokens, strict=True)
        ]
        self._sharing = SharedContexts(model)
        self._progress = progress
        self._name, self._side, self._done, self._total, self._truncated = "", "tuned", 0, 0, 0
        self._distinct: Iterable[int] = ()
        self.reading: Reading | None = None
        if accelerator is not None:
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def start(self, name: str, side: Side) -> None:
        self._name, self._side, self._truncated = name, side, 0
        self.model.eval()

    def _begin(self, requests: Sequence[Any]) -> None:
        self._done, self._total = 0, len(requests)
        # with several processes lm-eval evens their shares out by asking the last request of a share again
        self._distinct = {id(request): index for index, request in reversed(list(enumerate(requests)))}.values()

    def _tell(self) -> None:
        self._done += 1
        if self._progress is not None and self.rank == 0:
            self._progress(self._name, self._side, self._done, self._total)

    # -- likelihoods ---------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._begin(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Any], *_: Any, **__: Any) -> list[tuple[float, bool]]:
        for index in self._distinct:
            _, context, answer = requests[index]
            if len(answer) > self.max_length:
                raise DataError(
                    f"{self._name}: an answer of {len(answer)} tokens is longer than the {self.max_length} "
                    "that fit; raise eval.max_length or leave the benchmark out"
                )
            # the last token is only predicted, never read
            self._truncated += len(context) + len(answer) > self.max_length + 1
        return log_likelihoods(
            self.model,
            [(context, answer) for _, context, answer in requests],
            max_length=self.max_length,
            size=self._sizes[0],
            # routing that must not look at answers is told where they begin, which it can be in whole rows
            sharing=self._sharing if self.reading is None else None,
            reading=None if self.reading is None else _told(self.reading, KnownPrompts(requests, self.max_length)),
            done=self._tell,
        )

    # -- generation ----------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self._begin(requests)
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        texts: dict[int, str] = {}
        alike: dict[str, list[int]] = {}  # requests that are generated in the same way
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(number)
        for numbers in alike.values():
            settings = requests[numbers[0]].args[1]
            room = self.max_length - settings["max_gen_toks"]
            self._truncated += sum(lengths[number] > room for number in set(numbers) & set(self._distinct))
            prompts = [
                _Prompt(number, requests[number].args[0], min(lengths[number], room) + settings["max_gen_toks"])
                for number in numbers
            ]
            run_in_batches(prompts, self._sizes[1], partial(self._generate, settings=settings, texts=texts))
        return [texts[number] for number in range(len(requests))]

    def _generate(self, prompts: Sequence[_Prompt], *, settings: dict[str, Any], texts: dict[int, str]) -> None:
        options = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        stops = handle_stop_sequences(options.pop("until"), eos=self.tok_decode(self.eot_token_id, False))
        new_tokens = options.pop("max_gen_toks")
        if not options.get("do_sample"):
            options.pop("temperature", None)  # transformers warns of a temperature that it does not use
        greedy = not options.get("do_sample") and options.get("num_beams", 1) == 1
        ids_BS, mask_BS = self.tok_batch_encode(
            [prompt.text for prompt in prompts],
            left_truncate_len=self.max_length - new_tokens,
            truncation=self.truncation,
        )
        written = generate(
            self.model,
            self.tokenizer,
            ids_BS.to(self.device),
            mask_BS.to(self.device),
            stops=stops,
            new_tokens=new_tokens,
            # a decision for a whole sequence is kept for the rows as they were when it was taken
            drops_rows=greedy and self.reading is None and self._sharing.longest > 0,
            **options,
        )
        for prompt, tokens in zip(prompts, written, strict=True):
            text = self.tok_decode(tokens)
            texts[prompt.number] = postprocess_generated_text(text, stop=stops, think_end_token=None)
            self._tell()

    # -- several processes ---------------------------------------------------------------------------------------------

    def truncated_everywhere(self) -> int:
        """Truncated requests on all processes."""
        return int(self.all_gather(torch.tensor([self._truncated], device=self.device)).sum())

    def share(self, result: BenchmarkResult | None) -> BenchmarkResult:
        """The first process's result, on every process."""
        box = [result]
        if self.world_size > 1:
            torch.distributed.broadcast_object_list(box, src=0)
        assert box[0] is not None
        return box[0]


def _told(reading: Reading, known: KnownPrompts) -> Callable[[Tensor], AbstractContextManager[Any]]:
    return lambda ids_BS: reading(known.tokens(ids_BS))


def _in_step() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
