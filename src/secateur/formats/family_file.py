"""A family that a person describes in a YAML file, with the fields that an entry of ours has.

model_type: biogpt
blocks: biogpt.layers
stock: {heads: dense}
"""

from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from secateur.base.errors import SecateurError
from secateur.base.files import read_yaml
from secateur.formats.stock import STOCK, Stock
from secateur.model.families import FAMILIES, Family

T = TypeVar("T", Family, Stock)
KIND, WIDTHS = "model_type", "stock"
_READ: set[str] = set()
"""Families from files, which may be read again."""


def read_family(path: Path) -> str:
    """Make a family known in this process, and return its model_type.

    Raises:
        SecateurError: the file cannot be read, a field does not exist or has a wrong value, or the family is ours.
    """
    try:
        raw = read_yaml(path)
    except (OSError, UnicodeDecodeError) as error:
        raise SecateurError(f"{path}: cannot be read ({error}); name a YAML file") from error
    if not isinstance(raw, dict) or not isinstance(raw.get(KIND), str):
        raise SecateurError(f"{path}: a family is a mapping with {KIND} and the names of layers; see docs/extend.md")
    kind, widths = raw.pop(KIND), raw.pop(WIDTHS, {})
    if kind in FAMILIES and kind not in _READ:
        raise SecateurError(f"{path}: secateur knows {kind}; leave --family out")
    FAMILIES[kind], STOCK[kind] = _made(path, Family, raw, ""), _made(path, Stock, widths, f"{WIDTHS}.")
    _READ.add(kind)
    return kind


def _made(path: Path, owner: type[T], raw: Any, place: str) -> T:
    """One of our entries from a mapping."""
    if not isinstance(raw, dict):
        raise SecateurError(f"{path}: {place.rstrip('.')} is {raw!r}; write a mapping")
    known, hints, values = [field.name for field in fields(owner)], get_type_hints(owner), {}
    for name, value in raw.items():
        if name not in known:
            raise SecateurError(f"{path}: {place}{name}: no such field; there are {', '.join(known)}")
        try:
            values[name] = TypeAdapter(hints[name]).validate_python(value, strict=not isinstance(value, list))
        except ValidationError as error:
            raise SecateurError(f"{path}: {place}{name}: {value!r}: {error.errors()[0]['msg']}") from error
    return owner(**values)
