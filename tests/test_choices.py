"""Choices of groups as they are typed: what no composition can make is refused with the names that there are."""

import pytest

from loramoe_train.choices import check_choices, check_options, groups
from loramoe_train.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["eval=null"], "eval=null: eval is a group and takes a name; choose one of default, quick; to train without"),
        (["data=null"], "choose one of lora_mixer_seven, mixlora_commonsense, mola_six, tiny"),
        (["aux_loss=null"], "; for nothing: aux_loss=none"),
        (["launcher=null"], "choose one of local, slurm"),
        (["hydra/launcher=null"], "hydra/launcher is a group"),
        (["+recipe=null"], "for none leave it out"),
        (["eval=quick,null"], "eval=quick,null: eval is a group"),
        (["router=3"], "router=3: router is a group"),
        (["router=range(0,3)"], "router=range(0,3): router is a group"),
        (["eval=true"], "eval=true: eval is a group"),
        (["eval=[default,quick]"], "eval takes one name and no list; choose one of default, quick"),
        (["+recipe=[lora,mola]"], "recipe takes one name and no list"),
        (["aux_loss=[load_balance,null]"], "aux_loss takes names"),
        (["recipe=lora", "+recipe=mola"], "recipe is given twice (recipe=lora recipe=mola)"),
        (["~eval"], "~eval: a group cannot be left out; choose one of default, quick"),
        (["=3"], "there is no key before the ="),
        (["+=3"], "there is no key before the ="),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_choice_that_nobody_can_make(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_choices(overrides)
    assert words in str(refused.value)


def test_what_hydra_composes_or_explains_itself_passes() -> None:
    check_choices(["+recipe=lora", "eval=quick", "router=soft,topk", "aux_loss=[load_balance,router_z]", "seed=null"])
    check_choices(["recipe=glob(*)", "router={scope: none}", "eval=qick", "data/task@data.definitions.x=[a", "eval="])
    check_choices(["~trainer.stages", "++trainer.stages={a: {}}", "--multirun", "--config-dir", "mine", "aux_loss=[]"])
    assert groups()["eval"] == ["default", "quick"] and "gsm8k" in groups()["data/task"]


OPTIONS = (["--nope"], ["--config-name"], ["--cfg", "nope"], ["--info", "nope"], ["--resolve"], ["--run", "--multirun"])


@pytest.mark.parametrize("arguments", [*OPTIONS, ["--experimental-rerun", "job.pickle"]], ids=" ".join)
def test_options_that_hydra_does_not_take(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=f"{arguments[0]}.*; --hydra-help lists the options"):
        check_options(arguments)
    assert capsys.readouterr() == ("", "")
    check_options(["--cfg", "job", "--resolve", "--package", "trainer", "+recipe=lora", "seed=0"])
