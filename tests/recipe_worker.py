"""Runs of recipes in processes of their own, many in one process so that its start is paid once.

`python -m tests.recipe_worker load` reads lines {"folder", "ids", "out"}: rebuilds the run in `folder` as the command
`loramoe-eval` does, writes its logits to `out` and answers `done`. `python -m tests.recipe_worker train JOBS.json`, one
rank or several, trains every {"config", "run_dir"} in float64 and writes `weights.safetensors` there.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from loramoe_train.reuse import config_of
from loramoe_train.run import rebuild
from loramoe_train.schema.run import RunConfig
from tests.recipe_runs import get_ready, logits_of


def load(job: dict[str, Any]) -> None:
    config, adapter, manifest = config_of(Path(job["folder"]), [])
    routed = rebuild(config, adapter, manifest, device=torch.device("cpu"))
    save_file({"logits": logits_of(routed, torch.tensor(job["ids"]))}, job["out"])


def train(jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        ready, run_dir = get_ready(RunConfig.model_validate(job["config"])), Path(job["run_dir"])
        ready.routed.model.double()
        ready.train(run_dir)
        if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
            continue
        save_file(ready.weights(), run_dir / "weights.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "train":
        train(json.loads(Path(sys.argv[2]).read_text()))
    for line in sys.stdin if sys.argv[1] == "load" else ():
        load(json.loads(line))
        print("done", flush=True)
