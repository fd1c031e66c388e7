"""Import of every module of a package, so that a new criterion, kind of unit or family is just a new file."""

from importlib import import_module
from pathlib import Path
from types import ModuleType


def import_modules(package: str, *, skip: tuple[str, ...] = ()) -> list[ModuleType]:
    """Import the modules of a package, and return them sorted by name.

    Args:
        package: Full name of the package.
        skip: Names of modules that are not imported; names that begin with an underscore are skipped in any case.
    """
    files = sorted(Path(str(import_module(package).__file__)).parent.glob("[!_]*.py"))
    return [import_module(f"{package}.{file.stem}") for file in files if file.stem not in skip]
