"""docs/adding_a_method.md, followed to the letter: its files are written and its commands run."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cli import check_refused, run_cli

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "adding_a_method.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`(mine/\S+)`:\n\n```\w+\n(.*?)^```", PAGE, flags=re.S | re.M))
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.S | re.M)
COMMANDS = [line for block in BLOCKS for line in block.replace(" \\\n", " ").splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where somebody who follows the page is, with the page's files."""
    here = tmp_path_factory.mktemp("follow")
    for name, text in FILES.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(text)
    return here


def test_one_python_file_one_option_one_test_and_a_recipe():
    assert [Path(name).suffix for name in FILES] == [".py", ".yaml", ".py", ".yaml"]
    assert len(COMMANDS) == 5 and COMMANDS[0] == "export PYTHONPATH=$PWD/mine"


@pytest.mark.parametrize("command", COMMANDS[1:], ids=lambda command: command.split("#")[0].strip())
def test_the_commands_do_what_the_page_says(command, folder):
    command, _, refused = command.partition("   # refused: ")
    program, *arguments = shlex.split(command)
    paths = os.pathsep.join([str(folder / "mine"), str(ROOT)])
    if program == "python":
        environment = {**os.environ, "PYTHONPATH": paths}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    else:
        done = run_cli(program.removeprefix("loramoe-"), *arguments, cwd=folder, PYTHONPATH=paths)
    if refused:
        check_refused(done, 2, "router.make", refused)
        return
    assert done.returncode == 0, done.stdout + done.stderr
    if program == "loramoe-plan":
        assert "ReluRouter" in done.stdout
    if program == "python":
        assert "2 passed" in done.stdout
    if program == "loramoe-train":
        run = folder / "runs" / "relu"
        log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert all("load_balance" in line["aux"] for line in log if line["kind"] == "train")
        stored = load_file(run / "adapter.safetensors")
        sites = {name.split(".")[-3] for name in stored if name.endswith("router.weight")}
        assert sites == {"gate_proj", "up_proj", "down_proj"}
