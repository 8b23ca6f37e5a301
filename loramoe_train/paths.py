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
ASSETS = PACKAGE / "assets"
