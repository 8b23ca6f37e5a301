"""Every YAML: composes, fits the schema, and its parts fit the classes they name."""

import pytest
import yaml

from loramoe_train.paths import CONFIGS, RECIPES
from loramoe_train.schema.run import defaults
from loramoe_train.validation import validate
from tests.composing import RECIPE_NAMES, composed

GROUPS = ("model", "experts", "router", "aux_loss", "data", "trainer", "eval", "launcher")
OPTIONS = sorted(f"{g}={p.stem}" for g in GROUPS for p in (CONFIGS / g).glob("*.yaml"))


def test_the_globs_find_what_there_is():
    assert {"lora", "lora_mixer"} <= set(RECIPE_NAMES) and len(OPTIONS) > 20


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_every_recipe_composes_with_every_kind_of_model(recipe):
    for model in ("tiny", "llama3_8b", "falcon_mamba_7b"):
        config = composed(f"+recipe={recipe}", f"model={model}")
        assert config.trainer.stages


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes(option):
    if option == "launcher=slurm":
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    extra = ["model.name=mine"] if option == "model=custom" else []
    config = composed(option, *extra)
    assert config.plain()


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_a_recipe_fixes_neither_model_nor_data_and_names_its_paper(recipe):
    text = (RECIPES / f"{recipe}.yaml").read_text()
    values = yaml.safe_load(text)
    assert not {"model", "data"} & set(values)
    assert "arXiv" in text.splitlines()[0] + text.splitlines()[1]


def test_papers_sizes_hold_on_papers_models_and_suggestions_on_small_ones():
    big, small = composed("+recipe=lora_mixer", "model=llama3_8b"), composed("+recipe=lora_mixer")
    assert (big.experts.rank, big.experts.alpha, big.trainer.lr) == (64, 128.0, 1e-5)
    assert small.experts.rank == 8 and small.trainer.lr == 3e-3
    assert composed("+recipe=lora_mixer", "experts.rank=4").experts.rank == 4


def test_sbl_is_rsl():
    one, two = composed("aux_loss=rsl").aux_loss, composed("aux_loss=sbl").aux_loss
    assert one == two == composed("aux_loss=[routing_specialization]").aux_loss and one


def test_several_aux_losses():
    assert list(composed("aux_loss=[load_balance,router_z]").aux_loss) == ["load_balance", "router_z"]


def test_schema_defaults_need_no_plus():
    config = composed("trainer.early_stopping={patience: 2}", "data.sampling.strategy=equal", "model.path=x")
    assert config.trainer.early_stopping.patience == 2 and config.data.sampling.strategy == "equal"


def test_the_dump_validates_to_itself():
    config = composed("+recipe=lora_mixer")
    assert validate(config.plain()) == config
    assert set(defaults()) == set(config.plain())
