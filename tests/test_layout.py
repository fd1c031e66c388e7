"""Imports between folders and between files have no circle, and each family is declared once."""

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


LINES, FILES_OF_SRC = 36_362, 266
"""Size of the package. Whoever raises a number says in the commit why the package has to grow."""


def test_the_package_grows_on_purpose_only() -> None:
    files = list(ROOT.rglob("*.py"))
    assert len(files) <= FILES_OF_SRC
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files) <= LINES


def test_no_flat_files() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}


def test_the_graph_of_folders_has_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for file in ROOT.glob("*/**/*.py"):
        folder = file.relative_to(ROOT).parts[0]
        found = {other for name in imports(file) if (other := folder_of(name)) not in (None, folder)}
        graph[folder] = graph.get(folder, set()) | found
    assert {"base", "gguf", "cli"} <= graph.keys()
    # A circle raises an error that names its folders.
    list(TopologicalSorter(graph).static_order())


def test_no_two_files_import_each_other() -> None:
    files = {".".join(file.relative_to(ROOT.parent).with_suffix("").parts): file for file in ROOT.rglob("[!_]*.py")}
    graph = {
        # An import names a file, or something in it.
        name: {other for given in imports(file) for other in (given, given.rpartition(".")[0]) if other in files}
        for name, file in files.items()
    }
    list(TopologicalSorter(graph).static_order())


FILES = [file.stem for file in Path(families.__file__).parent.glob("[!_]*.py")]
LINEAGES = sorted(set(FILES) - {"entry", "family", "registry"})


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
