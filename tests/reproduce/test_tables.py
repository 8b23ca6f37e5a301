"""The shipped tables: they hold what they must, and what is typed wrongly is told in one line."""

from pathlib import Path

import pytest
import yaml

from loramoe_train.errors import ConfigError
from loramoe_train.evaluation.tasks import __file__ as benchmarks
from loramoe_train.paths import CONFIGS, PAPER, recipe_files
from loramoe_train.reproduce import tables
from loramoe_train.reproduce.command import parsed, run
from loramoe_train.reproduce.schema import PaperTable
from tests.reproduce.made import table

NAMES = tables.names()
RAW = {name: yaml.safe_load((PAPER / f"{name}.yaml").read_text(encoding="utf-8")) for name in NAMES}
each = pytest.mark.parametrize("name", NAMES)


def test_the_tables_of_the_issue_are_there() -> None:
    wanted = {f"lora_mixer_table{n}" for n in (2, 3, 8, 9)} | {f"mola_table{n}" for n in (1, 2, 8)}
    assert wanted | {"lora_mixer_figures3_4", "mixlora_single_task", "mixlora_multi_task"} <= set(NAMES)


def test_they_are_no_recipes() -> None:
    assert not any("paper" in name for name in recipe_files()) and "mola" in recipe_files()


def tasks_of(overrides: list[str]) -> list[str]:
    (data,) = (text.removeprefix("data=") for text in overrides if text.startswith("data="))
    return yaml.safe_load((CONFIGS / "data" / f"{data}.yaml").read_text(encoding="utf-8"))["tasks"]


@each
def test_a_table_names_recipes_groups_and_benchmarks_that_exist(name: str) -> None:
    read = tables.load(name)
    for method in read.methods.values():
        assert method.recipe is None or method.recipe in recipe_files()
    known = {path.stem for path in Path(benchmarks).parent.glob("*.yaml")}
    for scale in read.scales.values():
        given = [text for base in scale.bases.values() for text in base.overrides]
        for text in [*given, *(text for train in scale.train.values() for text in train)]:
            group, _, option = text.partition("=")
            assert group not in ("model", "data") or (CONFIGS / group / f"{option}.yaml").is_file(), text
        for place in scale.columns.values():
            if place.load is None:
                assert place.name.partition("@")[0] in known
            else:
                assert place.load.task is None or place.load.task in tasks_of(scale.train[place.train])


@each
def test_every_number_has_a_base_of_the_paper_scale_and_is_plausible(name: str) -> None:
    read = tables.load(name)
    for block in read.numbers:
        assert block.base in read.scales["paper"].bases and block.source
        for row in block.rows.values():
            for value in row.values():
                numbers = [value] if isinstance(value, float) else [value.value, value.low, value.high]
                assert all(number is None or 0 < number <= 100 for number in numbers)


def test_printed_means_are_those_of_the_printed_cells() -> None:
    """A slip of the pen in a table would show here; LoRA-Mixer prints none."""
    for name in ("mixlora_single_task", "mixlora_multi_task"):
        read = tables.load(name)
        for block in read.numbers:
            for method, row in block.rows.items():
                parts = [row[column] for column in read.columns["avg"].mean_of if column in row]
                if len(parts) == len(read.columns["avg"].mean_of):
                    assert sum(parts) / len(parts) == pytest.approx(row["avg"], abs=0.16), (block.base, method)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reference": "full"}, "reference names 'full'"),
        ({"methods": {"x": {"title": "X"}}}, "give exactly one of recipe, base: true and absent"),
        ({"methods": {"x": {"title": "X", "recipe": "lora", "seed": 1}}}, "Extra inputs are not permitted"),
        ({"numbers": [{"base": "b", "mark": "seen", "source": "s", "rows": {"zora": {}}}]}, "numbers names 'zora'"),
        ({"numbers": [{"base": "b", "mark": "guess", "source": "s", "rows": {}}]}, "'seen', 'recalled' or 'inferred'"),
        ({"columns": {"a": {"title": "A", "rule": "r", "mean_of": ["z"]}}}, "names 'b'"),
    ],
)
def test_a_table_that_does_not_fit_together_is_refused(tmp_path: Path, change: dict, words: str) -> None:
    values = {**table().model_dump(exclude_unset=True), **change}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as refused:
        tables.read(tmp_path / "mine.yaml")
    assert "mine.yaml" in str(refused.value) and words in str(refused.value)


@pytest.mark.parametrize("text", ["a: [", "- a", ""])
def test_a_file_that_is_no_table(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match="mine.yaml"):
        tables.read(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mola_tabel1"], "no table 'mola_tabel1'; did you mean 'mola_table1'?"),
        (["mola_table1", "scale=tiyn"], "no such scale; did you mean 'tiny'?"),
        (["mola_table4", "scale=tiny"], "this table has no such scale; known: paper"),
        (["mola_table1", "format=html"], "no such format; known: csv, latex, markdown, text"),
        (["mola_table1", "seeds=0,x"], "seeds=0,x must be different whole numbers"),
        (["mola_table1", "seeds=1,1"], "seeds=1,1 must be different whole numbers"),
        (["mola_table1", "seed=1"], "give seeds=0,1,2"),
        (["mola_table1", "plan"], "'plan' is no KEY=VALUE"),
        (["scale=tiny"], "wants the name of a table first"),
        (["mola_table1", "run=false", "trainer.max_steps=3"], "run=false starts no run"),
        (
            ["mola_table1", "run=false", "methods=mola_2486"],
            "methods=mola_2486: the table has no such row; did you mean",
        ),
        (["mola_table1", "run=false", "reference=base"], "reference=base: the table has no row of that name"),
        (["mola_table1", "run=false", "plot=x.gif"], "plot=x.gif must end in .png"),
        (["mola_table1", "run=false", "plot=no/x.png"], "there is no folder no"),
    ],
)
def test_what_is_typed_wrongly(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refused:
        options = parsed(arguments)
        run(arguments)
        assert options.seeds
    assert words in str(refused.value) and not list(tmp_path.iterdir())


def test_numbers_alone_are_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(["lora_mixer_table3"])
    shown = capsys.readouterr()
    assert "not run (paper 84.75)" in shown.out and "an encoder-decoder" in shown.out
    assert "nothing of lora_mixer_table3 can be run at scale=paper" in shown.err and not list(tmp_path.iterdir())


def test_no_name_lists_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    run([])
    listed = capsys.readouterr().out
    assert all(name in listed for name in NAMES)


def test_a_table_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        table().paper = "another"  # type: ignore[misc]
    assert isinstance(table(), PaperTable)
