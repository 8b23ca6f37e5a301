"""What the server of `forks.py` has done before it forks: every import, and one tiny run for those that come late."""

import gc
import tempfile
from pathlib import Path

import hydra  # noqa: F401
import torch
import transformers.convert_slow_tokenizer  # noqa: F401
from accelerate.state import AcceleratorState, GradientState

import loramoe_train.cli
import loramoe_train.run  # noqa: F401
from tests.training.harness import make_parts, make_trainer, train

torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    train(make_parts(), make_trainer(stages={"only": {"steps": 1}}, eval_every=1), Path(folder))
AcceleratorState._reset_state(True)  # a child may be one of several ranks
GradientState._reset_state()
gc.freeze()  # else every child goes through all that the imports have made
