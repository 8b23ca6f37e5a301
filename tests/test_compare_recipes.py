"""The script that makes the table of all recipes: it knows which of them start from adapters, and where it writes."""

import pytest

from loramoe_train.paths import RECIPES
from scripts.compare_recipes import BEGIN, END, spread, wants_adapters, write
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
