"""`loramoe-reproduce` as a process: what it prints before anything is run, and what it refuses."""

from pathlib import Path

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
