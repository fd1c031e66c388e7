"""Recipes that come with the package: one for each table and figure of the paper."""

from pathlib import Path

FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """Return the names of these recipes, without `.yaml`."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))
