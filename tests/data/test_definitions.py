"""Task files by name."""

import subprocess
import sys

import pytest

from loramoe_train.data.definitions import load_definitions
from loramoe_train.errors import ConfigError
from loramoe_train.paths import CONFIGS
from loramoe_train.schema.data import DataConfig

TASKS = CONFIGS / "data" / "task"


def test_first_folder_wins(tmp_path):
    (tmp_path / "gsm8k.yaml").write_text("prompt: mine\n")
    found = load_definitions(["cola", "gsm8k"], [tmp_path, TASKS])
    assert list(found) == ["cola", "gsm8k"] and found["gsm8k"] == {"prompt": "mine"}


@pytest.mark.parametrize("name", ["gsm8", "../tiny", "nothing_like_it"])
def test_unknown_task(name):
    with pytest.raises(ConfigError, match="data.tasks: no task is called") as caught:
        load_definitions([name], [TASKS])
    if name == "gsm8":
        assert str(caught.value).endswith("did you mean 'gsm8k'?")


@pytest.mark.parametrize(
    ("content", "message"), [("a: [1\nb: 2\n", ":2: not valid YAML"), ("- a\n", ": task toy must be a mapping")]
)
def test_bad_file(tmp_path, content, message):
    (tmp_path / "toy.yaml").write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_definitions(["toy"], [tmp_path])
    assert str(caught.value).startswith(f"{tmp_path / 'toy.yaml'}{message}")


@pytest.mark.parametrize("path", sorted((CONFIGS / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_mixture_file_is_a_config(path):
    import yaml

    plain = yaml.safe_load(path.read_text())
    config = DataConfig.model_validate(plain | {"definitions": load_definitions(plain["tasks"], [TASKS])})
    assert list(config.definitions) == config.tasks


def test_planning_needs_no_torch():
    code = (
        "import sys, loramoe_train.data.definitions, loramoe_train.data.sampling, loramoe_train.data.source;"
        "sys.exit('torch' in sys.modules or 'datasets' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
