"""Examples in docstrings print the shown results."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import secateur

ROOT = Path(secateur.__file__).parents[1]
MODULES = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in sorted(ROOT.glob("secateur/**/*.py"))
    if ">>> " in file.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_show(name: str) -> None:
    found = doctest.testmod(import_module(name))
    assert found.attempted
    assert not found.failed


def test_there_are_examples() -> None:
    assert "secateur.plan.target" in MODULES
