"""Options declared as dataclass fields: name, default, help text, panel and checks in one place.

The command line, the Python signature, recipes and the record in secateur.json are made from these fields.
"""

import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import field, fields
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from secateur.base.errors import SecateurError

T = TypeVar("T")


class OptionSpec(NamedTuple):
    """Declaration of an option. The dataclass field gives the name and the default."""

    panel: str
    """Heading under which `--help` lists the option."""
    help: str
    default_text: str | None = None
    """Default in words, for `--help`; None to show the default itself."""
    choices: Collection[str] = ()
    """Allowed values; empty if any value is allowed."""
    minimum: int | None = None
    percent: bool = False
    """Whether the command line also takes a percentage, such as 25%."""
    fit_only: bool = False
    """Whether only the fit depends on the option, so that `plan` and `survey` do not have it."""


def option(default: Any, panel: str, help: str, **settings: Any) -> Any:
    """Return a dataclass field that is also an option; `settings` are the other fields of `OptionSpec`."""
    return field(default=default, metadata={"option": OptionSpec(panel, help, **settings)})


def option_specs(owner: type) -> dict[str, OptionSpec]:
    """Return the declarations of a dataclass's options, by field name."""
    return {one.name: one.metadata["option"] for one in fields(owner) if "option" in one.metadata}


ACCEPTED: dict[type, tuple[Any, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
    bool: (bool, "True or False"),
    Path: (Path, "a path"),
    tuple: ((tuple, list), "a list of names, or names separated by commas"),
}
"""Types of values that an option of a declared type accepts, and how an error message calls them."""


def check_types(owner: Any) -> None:
    """Check that the options of a dataclass object have their declared types, and convert equivalent ones.

    Numbers of NumPy become Python's, a path becomes text, and names separated by commas become a tuple.

    Raises:
        SecateurError: An option has another type; the message names it.
    """
    hints = get_type_hints(type(owner))
    for name in option_specs(type(owner)):
        object.__setattr__(owner, name, _checked(name, getattr(owner, name), hints[name]))


def _checked(name: str, value: Any, hint: Any) -> Any:
    """Return the value of an option if it fits the type hint, as a plain Python number if it is a number."""
    types = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if value is None and NoneType in types:
        return None
    declared = get_origin(types[0]) or types[0]
    accepted, description = ACCEPTED[declared]
    if declared is tuple and isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    if declared is str and isinstance(value, Path):
        return str(value)
    items = value if isinstance(value, tuple | list) else ()
    # bool is a subclass of int, but no number here.
    wrong_bool = isinstance(value, bool) != (accepted is bool)
    if wrong_bool or not isinstance(value, accepted) or not all(isinstance(item, str) for item in items):
        raise SecateurError(f"{name} is {value!r}; it must be {description}")
    if declared is tuple:
        return tuple(items)
    if isinstance(value, Integral) and abs(int(value)) >= 2**63:
        raise SecateurError(f"{name} is a number of more than 18 digits; choose a smaller one")
    if not isinstance(value, Real) or isinstance(value, int | float):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def given_or_made(kind: type[T], given: T | None, settings: Mapping[str, Any], example: str) -> T:
    """Return an object of options as given, or made of settings, which are some of its fields by name.

    Args:
        kind: Class of the object.
        given: The object; None to make it.
        settings: Fields by name.
        example: A setting, for error messages.

    Raises:
        TypeError: Both are given, or the object is of another class.
    """
    if given is not None and not isinstance(given, kind):
        raise TypeError(f"{given!r} is not an object of {kind.__name__}; give options by name, such as {example}")
    if given is not None and settings:
        raise TypeError(f"{next(iter(settings))} is given together with {kind.__name__}; set it in that object")
    return given or kind(**settings)


def changed_options(options: Any, names: Iterable[str] | None = None) -> dict[str, str]:
    """Return the options (all, or those with some names) that differ from their default, as text for a command line."""
    values = {name: getattr(options, name) for name in names or option_specs(type(options))}
    return {
        name: ",".join(value) if isinstance(value, tuple) else str(value)
        for name, value in values.items()
        if value != getattr(type(options), name)
    }


def command_line(command: str, source: str, options: Mapping[str, str]) -> str:
    """Return the command that makes a model again, with the names of local files but not their folders."""
    words = ["secateur", command, _name_of(source), "OUT"]
    for name, value in options.items():
        words += [f"--{cli_name(name)}", _name_of(value)]
    return shlex.join(words)


def _name_of(path: str) -> str:
    """Return the name of a local file or folder without its folder; anything else unchanged."""
    return Path(path).name if Path(path).exists() else path


def cli_name(name: str) -> str:
    """Return the name of an option on the command line, without the leading dashes."""
    return name.replace("_", "-")
