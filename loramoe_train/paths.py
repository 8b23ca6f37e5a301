"""Where the shipped YAML and assets are: inside the package in a wheel, beside it in a checkout or editable install."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def shipped(folder: str) -> Path:
    """Absolute path of `configs` or `recipes`, from a wheel, an editable install or a bare checkout.

    The sibling of the package wins, because an editable build may leave a stale copy inside it.
    """
    beside, inside = PACKAGE.parent / folder, PACKAGE / folder
    if (PACKAGE.parent / "pyproject.toml").is_file() and beside.is_dir():
        return beside
    return inside


CONFIGS = shipped("configs")
RECIPES = shipped("recipes")
PAPER = RECIPES / "paper"  # tables of papers, which are no recipes (reproduce/)
ASSETS = PACKAGE / "assets"


def recipe_files() -> dict[str, Path]:
    """The shipped recipes: name, with the folder of nested ones, -> file."""
    found = sorted(path for path in RECIPES.rglob("*.yaml") if PAPER not in path.parents)
    return {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in found}
