"""Peak memory of this process alone."""

import subprocess
import sys

import torch

from loramoe_train.training.memory import memory_gib, peak_resident
from tests.conftest import ROOT

ASK = "from loramoe_train.training.memory import peak_resident; print(peak_resident())"


def test_the_peak_is_this_process_s_own():
    """A small process that a large one starts: getrusage would show the large one's peak there."""
    held = torch.ones(2**28, dtype=torch.uint8).add_(1)
    grown = peak_resident()
    own = int(subprocess.run([sys.executable, "-c", ASK], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    torch_alone = grown - held.nbytes
    assert 0 < own < grown - held.nbytes // 2 and own < 1.5 * torch_alone
    assert memory_gib(torch.device("cpu")) * 2**30 >= grown


def test_it_never_falls():
    before = peak_resident()
    held = torch.ones(2**27, dtype=torch.uint8).add_(1)
    during = peak_resident()
    del held
    assert peak_resident() >= during >= before
