"""The script that makes the table of all recipes: it knows which of them start from adapters, and where it writes."""

import json

import pytest

from loramoe_train.paths import RECIPES
from scripts.compare_recipes import BEGIN, END, speed, speed_runs, spread, wants_adapters, write
from tests.composing import RECIPE_NAMES, composed
from tests.recipe_passes import needs_adapters


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_it_brings_adapters_where_a_run_without_them_is_refused(recipe):
    assert wants_adapters(RECIPES / f"{recipe}.yaml") == needs_adapters(composed(f"+recipe={recipe}"))


def test_only_what_lies_between_the_marks_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write(page, "new")
    assert page.read_text() == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="has no"):
        write(page, "new")
    assert page.read_text() == "no marks"


def test_spread_over_seeds():
    assert spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0" and spread([2.0]) == "2.0 ± 0.0"


def test_speed_leaves_out_the_start_of_each_stage(tmp_path):
    seen = [("a", 10.0, 9.0), ("a", 100.0, 1.0), ("b", 10.0, 9.0), ("b", 400.0, 2.0), ("b", 100.0, 1.0)]
    lines = [
        {"kind": "train", "stage": stage, "timing": {"tokens_per_second": rate, "seconds": seconds}}
        for stage, rate, seconds in seen
    ]
    lines.insert(2, {"kind": "stage", "stage": "a", "timing": {}})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert speed(tmp_path) == (100 + 800 + 100) / 4


def test_every_round_begins_with_what_speed_is_related_to(tmp_path):
    rounds = speed_runs(tmp_path, ["mola", "lora"], 2)
    assert [list(places) for places in rounds] == [["lora", "mola"]] * 2
    assert rounds[1]["mola"] == tmp_path / "speed" / "mola" / "1"
