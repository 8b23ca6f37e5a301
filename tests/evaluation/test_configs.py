"""The shipped `eval` group is the schema's defaults, and each variant is valid."""

import pytest
import yaml

from loramoe_train.paths import CONFIGS
from loramoe_train.schema.evaluation import EvalConfig

FILES = sorted((CONFIGS / "eval").glob("*.yaml"))


def test_default_is_the_schema():
    values = yaml.safe_load((CONFIGS / "eval" / "default.yaml").read_text())
    assert values == EvalConfig().model_dump()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_variant_is_valid(path):
    values = yaml.safe_load(path.read_text())
    assert values.pop("defaults", ["default", "_self_"]) == ["default", "_self_"]
    EvalConfig.model_validate(values)
