"""A mixture: the rows of several tasks, each tokenised when it is first asked for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.util import Finalize

import numpy as np

from loramoe_train.data.cache import TokenCache
from loramoe_train.data.sampling import SamplePlan
from loramoe_train.data.shards import Found
from loramoe_train.data.source import Selected
from loramoe_train.data.templates import Renderer
from loramoe_train.data.tokens import Encoder, Example
from loramoe_train.schema.data import SamplingConfig

MEMO_BYTES = 256 * 2**20  # tokenised examples kept per mixture (and worker); beyond it rows are tokenised again
OVERHEAD_BYTES = 550  # of one kept example besides its tokens (tracemalloc: 532 on CPython 3.11)


@dataclass(frozen=True)
class TaskData:
    """One task of a mixture: its rows of one split and how they become text."""

    name: str
    domain: str
    split: str  # that the rows were read from
    rows: Selected
    renderer: Renderer
    cache: TokenCache | None = None  # of the file that the rows are in

    def __len__(self) -> int:
        return len(self.rows)

    def check(self) -> None:
        """Render every row: a bad one is found before training starts. Raises DataError naming file and line.

        Not again where the cache knows that these rows are good.
        """
        if self.cache is not None and self.cache.has_checked(self.rows.origin):
            return
        for index in range(len(self.rows)):
            self.renderer(self.rows[index], self.rows.where(index))
        if self.cache is not None:
            self.cache.note_checked(self.rows.origin)


class Mixture:
    """Tasks and domains with their indices, and `example(task, row)`.

    `notes` says what a user should know about how the data was taken (rows held out, rows left out).
    """

    def __init__(
        self, tasks: Sequence[TaskData], encoder: Encoder, *, seed: int, pad_id: int, notes: Sequence[str] = ()
    ):
        self.tasks = tuple(tasks)
        self.encoder, self.seed, self.pad_id, self.notes = encoder, seed, pad_id, tuple(notes)
        self.task_names = tuple(task.name for task in tasks)
        self.domain_names = tuple(dict.fromkeys(task.domain for task in tasks))  # in order of first appearance
        self.domain_of = tuple(self.domain_names.index(task.domain) for task in tasks)  # task index -> domain index
        # per task, by number of the row in its file; not a set of names, which would grow to a hundred bytes a row
        self._cut = [np.zeros(int(task.rows.origin.max(initial=-1)) + 1, dtype=bool) for task in tasks]
        self._memo: dict[tuple[int, int], Example] = {}
        self._memo_bytes = 0

    @property
    def sizes(self) -> dict[str, int]:
        """Rows per task."""
        return {task.name: len(task) for task in self.tasks}

    @property
    def truncated(self) -> dict[str, int]:
        """Per task, how many of the examples seen so far were cut to `max_length`."""
        return {name: int(cut.sum()) for name, cut in zip(self.task_names, self._cut, strict=True)}

    def plan(
        self,
        sampling: SamplingConfig,
        *,
        stage: str = "train",
        total: int | None = None,
        examples: int | None = None,
    ) -> SamplePlan:
        """The order of this mixture's samples in one stage; see SamplePlan."""
        return SamplePlan(self.sizes, sampling, seed=self.seed, stage=stage, total=total, examples=examples)

    def example(self, task: int, row: int) -> Example:
        """The tokens of one row. Raises DataError naming its file and line if it cannot be trained on."""
        key = (task, row)
        found = self._memo.get(key)
        if found is None:
            found = self._make(task, row)
            self.note_truncated([found])
            size = found.ids.nbytes + found.supervised.nbytes + OVERHEAD_BYTES
            if self._memo_bytes + size <= MEMO_BYTES:
                self._memo[key] = found
                self._memo_bytes += size
        return found

    def note_truncated(self, examples: Iterable[Example]) -> None:
        """Count what was cut, also by a worker process."""
        for example in examples:
            if example.truncated:
                self._cut[example.task][int(example.name.rpartition(":")[2])] = True

    def begin_worker(self) -> None:
        """In a forked process: write what it tokenises when it ends, besides what its parent writes."""
        for task in self.tasks:
            if task.cache is not None:
                task.cache.forget_added()
                Finalize(None, task.cache.flush, exitpriority=0)

    def _make(self, task: int, row: int) -> Example:
        data = self.tasks[task]
        number = int(data.rows.origin[row])
        found = None if data.cache is None else data.cache.get(number)
        if found is None:
            found = self._tokenise(data, row)
            if data.cache is not None:
                data.cache.add(number, found)
        ids, supervised, truncated = found
        name, domain = f"{data.name}:{data.split}:{number}", self.domain_of[task]
        return Example(name, task, domain, ids, supervised, truncated)

    def _tokenise(self, data: TaskData, row: int) -> Found:
        where = data.rows.where(row)
        encoded = self.encoder(data.renderer(data.rows[row], where), where)
        return np.asarray(encoded.ids, dtype=np.int32), np.asarray(encoded.supervised, dtype=bool), encoded.truncated
