"""A family that a user describes in a YAML file, with the fields of `secateur.families.family.Family`.

Fields that the file leaves out are derived from the model's class; with `derived: false` they have their defaults.

model_type: imaginary
heads_locked: its heads share a norm
gguf: {architectures: [llama]}
"""

from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from secateur.base.errors import SecateurError
from secateur.base.names import find
from secateur.families.entry import Entry
from secateur.families.family import Family
from secateur.families.registry import FAMILIES

KIND = "model_type"
DEEPEST = 20
"""Largest number of lists and mappings inside each other. A parser needs minutes for thousands of them."""
_READ: set[str] = set()
"""Families that were read from files; such a family may be read again."""


def _read_yaml(path: Path) -> Any:
    """Return the value of a YAML file.

    Raises:
        SecateurError: The file cannot be read, is not valid YAML, is nested too deeply, or has aliases, a few lines of
            which can expand to billions of values.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SecateurError(f"{path}: cannot be read ({error}); name a YAML file") from error
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise SecateurError(f"{path}: has aliases, which begin with *; write the values themselves")
            if depth > DEEPEST:
                raise SecateurError(f"{path}: nested too deeply; correct it")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" line {mark.line + 1}"
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise SecateurError(f"{path}{line}: not valid YAML ({problem}); correct it") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        # For example the 31st of February, or a number with more digits than Python reads.
        raise SecateurError(f"{path}: a value cannot be read ({error}); correct it") from error


def read_family(path: Path) -> str:
    """Make a family known in this process, and return its model_type.

    Raises:
        SecateurError: The file cannot be read, a field does not exist or has a wrong value, or secateur already knows
            the family.
    """
    raw = _read_yaml(path)
    if not isinstance(raw, dict) or not isinstance(raw.get(KIND), str):
        raise SecateurError(f"{path}: a family is a mapping with {KIND} and the names of layers; see docs/extend.md")
    kind = raw.pop(KIND)
    if kind in FAMILIES and kind not in _READ:
        raise SecateurError(f"{path}: secateur knows {kind}; leave --family out")
    facts = {name: raw.pop(name) for name in ("derived", "stock", "gguf", "vllm") if name in raw}
    described, entry = _entry(path, Family, raw, ""), _entry(path, Entry, facts, "")
    family: Entry = replace(entry, stated={name: getattr(described, name) for name in raw})
    # Found here, so that models are opened without the code of GGUF.
    known = find("secateur.gguf.architectures:ARCHITECTURES")
    if unknown := [name for name in family.gguf.architectures if name not in known]:
        raise SecateurError(
            f"{path}: gguf.architectures: secateur does not write {unknown[0]}; it writes {', '.join(known)}"
        )
    FAMILIES[kind] = family
    _READ.add(kind)
    return kind


def _entry(path: Path, owner: type[Any], raw: Any, place: str) -> Any:
    """Return an entry of a family, or of a part of one, from a mapping."""
    if not isinstance(raw, dict):
        raise SecateurError(f"{path}: {place.rstrip('.')} is {raw!r}; write a mapping")
    known, hints = [field.name for field in fields(owner) if field.name != "entry"], get_type_hints(owner)
    for name in raw:
        if name not in known:
            raise SecateurError(f"{path}: {place}{name}: no such field; there are {', '.join(known)}")
    needed = [field.name for field in fields(owner) if field.default is MISSING and field.default_factory is MISSING]
    if missing := [name for name in needed if name not in raw]:
        raise SecateurError(f"{path}: {place}{missing[0]} is missing")
    return owner(**{name: _value(path, hints[name], value, place + name) for name, value in raw.items()})


def _value(path: Path, hint: Any, value: Any, place: str) -> Any:
    """Return a field's value, checked against its type; parts such as `stock` are mappings themselves."""
    part: Any = next((one for one in get_args(hint) if one is not NoneType), hint)
    if isinstance(part, type) and is_dataclass(part) and value is not None:
        return _entry(path, part, value, f"{place}.")
    try:
        return TypeAdapter(hint).validate_python(value, strict=not isinstance(value, list))
    except ValidationError as error:
        raise SecateurError(f"{path}: {place}: {value!r}: {error.errors()[0]['msg']}") from error
