"""Families are found by the files that declare them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from secateur import families
from secateur.families.registry import FAMILIES, TWINS

FILES = [file.stem for file in Path(families.__file__).parent.glob("[!_]*.py")]
LINEAGES = sorted(set(FILES) - {"entry", "registry"})


@pytest.mark.parametrize("name", LINEAGES)
def test_a_file_declares_families_of_its_own(name: str) -> None:
    own = import_module(f"secateur.families.{name}").FAMILIES
    others = [import_module(f"secateur.families.{other}").FAMILIES for other in LINEAGES if other != name]
    assert own
    assert not own.keys() & set().union(*others)
    assert all(FAMILIES[model_type] is entry for model_type, entry in own.items())


def test_twins_are_of_families() -> None:
    assert TWINS
    assert {twin.family for twin in TWINS.values()} <= FAMILIES.keys()
    assert not TWINS.keys() & FAMILIES.keys()
