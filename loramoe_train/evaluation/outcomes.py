"""The file that grows while a code benchmark is scored: one program of the model's a line, as soon as it was run."""

import json
from pathlib import Path
from typing import Any

from loramoe_train.evaluation.types import Side


class OutcomeFiles:
    """`FOLDER/NAME.SIDE.code.jsonl`, begun anew by the first program of a benchmark and side.

    A line holds `index` (of the program among those of its process), `code`, `verdict`, `message` and `seconds`. With
    several processes each but the first writes `NAME.SIDE.code.PROCESS.jsonl`.
    """

    def __init__(self, folder: Path, process: int = 0) -> None:
        self._folder, self._process = folder, process
        self._begun: set[Path] = set()

    def __call__(self, name: str, side: Side, program: dict[str, Any]) -> None:
        """Append a line and hand it to the operating system. Raises OSError where the disk refuses."""
        path = self._folder / f"{name}.{side}.code{f'.{self._process}' if self._process else ''}.jsonl"
        if path not in self._begun:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            self._begun.add(path)
        line = json.dumps(program, ensure_ascii=False, allow_nan=False) + "\n"
        # a lone surrogate, which code may hold, has no UTF-8
        with open(path, "ab") as file:
            file.write(line.encode("utf-8", "backslashreplace"))
