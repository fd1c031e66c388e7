"""Options as dataclass fields: name, default, help, panel and check, each declared once.

The command line, the Python signature, recipes and the record in secateur.json all follow from these fields.
"""

from collections.abc import Collection, Iterable
from dataclasses import field, fields
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from secateur.base.errors import SecateurError


class OptionSpec(NamedTuple):
    """An option as a person meets it; the name and the default are those of its field."""

    panel: str
    help: str
    default_text: str | None = None
    """The default in words."""
    choices: Collection[str] = ()
    minimum: int | None = None
    percent: bool = False
    """A person may write it in per cent."""
    may_name_file: bool = False
    """The value may name a file."""
    fit_only: bool = False
    """Only the fit depends on it: `plan` and `survey` do without."""


def option(default: Any, panel: str, help: str, **how: Any) -> Any:
    """A field of a dataclass that is an option too; `how` as in `Declared`."""
    return field(default=default, metadata={"option": OptionSpec(panel, help, **how)})


def option_specs(owner: type) -> dict[str, OptionSpec]:
    """All options of a dataclass, by name."""
    return {one.name: one.metadata["option"] for one in fields(owner) if "option" in one.metadata}


TYPES: dict[type, tuple[Any, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
    bool: (bool, "True or False"),
    Path: (Path, "a path"),
    tuple: ((tuple, list), "a list of names"),
}
"""What an option of a type takes, and what that is called."""


def check_types(owner: Any) -> None:
    """See that what Python gave has the types that options are declared with; numbers may be NumPy's.

    Raises:
        SecateurError: another one.
    """
    hints = get_type_hints(type(owner))
    for name in option_specs(type(owner)):
        hint = hints[name]
        value, kinds = getattr(owner, name), get_args(hint) if isinstance(hint, UnionType) else (hint,)
        if value is None and NoneType in kinds:
            continue
        takes, called = TYPES[get_origin(kinds[0]) or kinds[0]]
        items = value if takes == TYPES[tuple][0] and isinstance(value, takes) else ()
        known = isinstance(value, takes) and all(isinstance(item, str) for item in items)
        if not known or (isinstance(value, bool) and takes is not bool):
            raise SecateurError(f"{name} is {value!r}; it must be {called}")
        if isinstance(value, Integral) and abs(int(value)) >= 2**63:
            raise SecateurError(f"{name} is a number of more than 18 digits; take a smaller one")
        if takes in (Integral, Real) and not isinstance(value, int | float):
            object.__setattr__(owner, name, int(value) if isinstance(value, Integral) else float(value))


def changed_options(options: Any, names: Iterable[str]) -> dict[str, str]:
    """Those options of some that are not the default, as a command line has them."""
    values = {name: getattr(options, name) for name in names}
    return {
        name: ",".join(value) if isinstance(value, tuple) else str(value)
        for name, value in values.items()
        if value != getattr(type(options), name)
    }


def cli_name(name: str) -> str:
    """An option's name on the command line."""
    return name.replace("_", "-")
