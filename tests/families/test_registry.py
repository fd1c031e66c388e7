"""The registry holds the families of all files of the folder, each declared once."""

from importlib import import_module
from pathlib import Path

import pytest

from secateur import families
from secateur.families.registry import FAMILIES, TWINS

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
