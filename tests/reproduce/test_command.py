"""`loramoe-reproduce` as a process: what it prints before anything is run, and what it refuses."""

from pathlib import Path

import pytest

from loramoe_train.errors import ConfigError
from loramoe_train.reproduce.command import HELP, parsed, run
from tests.cli import check_refused
from tests.forks import run_forked


def test_a_plan_writes_nothing(tmp_path: Path) -> None:
    given = ("plan=true", "methods=lora", "seeds=0,1", "trainer.max_steps=5", "tokens_per_second=100")
    done = run_forked("reproduce", "lora_mixer_table2", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 runs") and "hours of training at 100 tokens/s" in done.stdout
    assert not list(tmp_path.iterdir())


def test_refusals_are_one_line_and_start_nothing(tmp_path: Path) -> None:
    for arguments, words in (
        (("lora_mixer_tabel2",), "there is no table 'lora_mixer_tabel2'; did you mean 'lora_mixer_table2'?"),
        (("lora_mixer_table2", "scale=huge"), "there is no such scale; known: paper, small, tiny"),
        (
            ("lora_mixer_table2", "methods=lora", "trainer.stpes=3"),
            "lora on tiny: unknown key or group 'trainer.stpes'",
        ),
        (("lora_mixer_table2", "methods=mole"), "no row of this choice can be run here"),
    ):
        check_refused(run_forked("reproduce", *arguments, cwd=tmp_path), 2, words)
    assert not list(tmp_path.iterdir())


def test_plan_as_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed(["mola_table1", "--plan", "seeds=0"]) == parsed(["mola_table1", "plan=true", "seeds=0"])
    run(["mola_table1", "--help"])
    assert capsys.readouterr().out.strip() == HELP.strip() and "--plan" in HELP


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--seeds=0,1", "unknown option --seeds=0,1; the only ones are --plan and --help: write seeds=0,1"),
        ("--format", "write format=VALUE"),
        ("--plan=true", "write plan=true"),
        ("--dry-run", "unknown option --dry-run"),
        ("-m", "unknown option -m"),
        ("seeds=", "seeds=: seeds has no value"),
        ("seeds=0,99999999999999999999", "must be different whole numbers"),
        ("seeds=0,0", "must be different whole numbers"),
        ("methods=[]", "methods has no value"),
        ("run_dir=", "run_dir has no value"),
        ("scale=small", "scale is given twice, as tiny and as small"),
        ("sale", "'sale' is no KEY=VALUE; did you mean 'scale'?"),
        ("", "'' is no KEY=VALUE"),
        ("hydra.launcher.partition=gpu", "keys of hydra do nothing here; launcher.KEY=VALUE says"),
        ("+hydra/launcher=basic", "keys of hydra do nothing here"),
        ("tokens_per_second=nan", "tokens_per_second=nan must be a positive number"),
        ("tokens_per_second=0", "must be a positive number"),
        ("tokens_per_second=100", "tokens_per_second goes with plan=true"),
    ],
)
def test_an_argument_that_is_none(argument: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        run(["mola_table1", "scale=tiny", argument])
    assert words in str(refused.value)


def test_the_name_comes_first() -> None:
    with pytest.raises(ConfigError, match="wants the name of a table first, got '--plan'"):
        run(["--plan", "mola_table1"])
