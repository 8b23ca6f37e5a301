"""The README's commands are what CI runs, and they work."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.cli import run_cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAIN, TEST = [block.strip() for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S)[:2]]


def test_ci_runs_the_readmes_test_command():
    assert "\n" not in TEST and TEST in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_two_commands_install_alike():
    assert MAIN.startswith("pip install -c constraints.txt torch==2.13.0 -e ") and "\n" not in MAIN
    assert MAIN.endswith("&& loramoe-train +recipe=lora_mixer")


def test_the_recipe_table_lists_every_recipe():
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert f"`{path.stem}`" in README, path.stem


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


@pytest.mark.slow
def test_the_main_command_beats_the_base_on_every_family(tmp_path):
    arguments = MAIN.partition("loramoe-train ")[2].split()
    done = run_cli("train", *arguments, f"run_dir={tmp_path}/run", cwd=tmp_path, timeout=1200, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "run" / "results.json").read_text())["scores"]
    assert len(scores) == 5
    for name, score in scores.items():
        assert score["tuned"] > score["base"] + 0.1, (name, score)
    assert (tmp_path / "run" / "adapter.safetensors").is_file()


def test_git_knows_no_large_or_stray_file():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    sizes = {
        name: (ROOT / name).stat().st_size for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()
    }
    assert max(sizes.values()) < 10_000_000
