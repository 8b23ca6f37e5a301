"""The wheel brings its configs, recipes and assets, and finds them without the checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from loramoe_train.paths import PAPER, recipe_files

ROOT = Path(__file__).resolve().parents[1]
COMPOSE = """
import sys
sys.path.insert(0, {site!r})
from hydra import compose, initialize_config_dir
from loramoe_train import paths
from loramoe_train.composition import register
assert str(paths.PACKAGE).startswith({site!r}), paths.PACKAGE
register()
with initialize_config_dir(str(paths.CONFIGS), version_base="1.3"):
    for name in paths.recipe_files():
        compose("train", [f"+recipe={{name}}"])
        print(name)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_every_recipe_composes_from_the_wheel(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = COMPOSE.format(site=str(tmp_path))
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == set(recipe_files())


def test_the_wheel_holds_the_embedded_model_and_is_small(wheel):
    assert wheel.stat().st_size < 10_000_000
    names = zipfile.ZipFile(wheel).namelist()
    assert "loramoe_train/assets/tiny/model/model.safetensors" in names
    assert {f"loramoe_train/recipes/paper/{path.name}" for path in PAPER.glob("*.yaml")} <= set(names)
    assert any(name.startswith("loramoe_train/assets/tiny/data/tiny_math/train.jsonl") for name in names)
    assert not any("/tests/" in name or name.startswith("tests/") for name in names)
