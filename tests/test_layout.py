"""The package has one folder for each step, imports run in one direction only, and each family is declared once."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import secateur
from secateur import families
from secateur.families.registry import FAMILIES, TWINS

ROOT = Path(secateur.__file__).parent
ORDER = [
    "base",
    "families",
    "model",
    "text",
    "numerics",
    "criteria",
    "survey",
    "plan",
    "fit",
    "write",
    "formats",
    "measure",
    "report",
    "vocabulary",
    "commands",
    "retraining",
    "cli",
]
"""The folders in the order in which the data goes; each imports from those before it."""


def imports(file: Path) -> Iterator[str]:
    """Yield the modules and names that a file imports, at run time or for types only."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def folder_of(name: str) -> str | None:
    """Return the folder of secateur that an imported name comes from."""
    first, *rest = name.split(".")
    return rest[0] if first == "secateur" and rest and (ROOT / rest[0]).is_dir() else None


def test_no_other_folders_and_no_flat_files() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert folders == set(ORDER)
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("folder", ORDER)
def test_imports_run_to_the_left(folder: str) -> None:
    allowed = set(ORDER[: ORDER.index(folder) + 1])
    wrong = {
        f"{file.relative_to(ROOT)} imports {name}"
        for file in (ROOT / folder).rglob("*.py")
        for name in imports(file)
        if folder_of(name) not in {None, *allowed}
    }
    assert not wrong


@pytest.mark.parametrize("folder", ORDER)
def test_no_two_files_import_each_other(folder: str) -> None:
    """Imports inside a folder have no cycles."""
    files = {f"secateur.{folder}.{file.stem}": file for file in (ROOT / folder).glob("[!_]*.py")}
    graph = {
        name: {
            other for given in imports(file) for other in files if other != name and f"{given}.".startswith(f"{other}.")
        }
        for name, file in files.items()
    }
    # A cycle raises an error that names its files.
    list(TopologicalSorter(graph).static_order())


FILES = [file.stem for file in Path(families.__file__).parent.glob("[!_]*.py")]
LINEAGES = sorted(set(FILES) - {"entry", "registry"})


@pytest.mark.parametrize("name", LINEAGES)
def test_every_file_declares_families_that_no_other_file_declares(name: str) -> None:
    own = import_module(f"secateur.families.{name}").FAMILIES
    others = [import_module(f"secateur.families.{other}").FAMILIES for other in LINEAGES if other != name]
    assert own
    assert not own.keys() & set().union(*others)
    assert all(FAMILIES[model_type] is entry for model_type, entry in own.items())


def test_twins_name_known_families_and_are_none_themselves() -> None:
    assert TWINS
    assert {twin.family for twin in TWINS.values()} <= FAMILIES.keys()
    assert not TWINS.keys() & FAMILIES.keys()


def test_the_papers_tables_use_the_public_api_only() -> None:
    used = {
        name
        for file in (ROOT.parents[1] / "paper").glob("*.py")
        for name in imports(file)
        if name.split(".")[0] == "secateur"
    }
    assert used <= {"secateur", *(f"secateur.{name}" for name in secateur.__all__)}
