"""Folders of which each file is an entry: a criterion, a kind of unit, a family."""

from importlib import import_module
from pathlib import Path
from types import ModuleType


def import_modules(package: str, *, skip: tuple[str, ...] = ()) -> list[ModuleType]:
    """Import the files of a package in the order of their names; return their modules.

    Args:
        package: full name.
        skip: names of files that are no entries; neither are those that begin with an underscore.
    """
    files = sorted(Path(str(import_module(package).__file__)).parent.glob("[!_]*.py"))
    return [import_module(f"{package}.{file.stem}") for file in files if file.stem not in skip]
