"""Commands from declarations: a parameter that is a dataclass of options becomes these options.

A command is a plain function. Where one of its parameters is annotated with `Options`, `RunOptions` or another
dataclass whose fields are declared by `secateur.base.options.option`, the command line gets one option for each field,
and the function an object of the class. `Only(...)` and `Without(...)` in the annotation pick some of the fields.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from secateur.base.options import OptionSpec, cli_name, option_specs
from secateur.cli.terminal import MESSAGES, OutputOptions, set_output_options
from secateur.cli.values import parse_share

_ORDER = ("Target", "Method", "Calibration", "What to measure", "Training", "Output", "Computing", MESSAGES)


@dataclass(frozen=True)
class Only:
    """The fields of a dataclass that a command takes."""

    names: tuple[str, ...]
    check: Callable[[dict[str, Any]], None] = lambda _: None
    """Sees their values before the dataclass does: what is wrong with them for this command alone."""

    def picks(self, name: str) -> bool:
        """Whether a field is one of them."""
        return name in self.names


class Without(Only):
    """The fields of a dataclass that a command does not take."""

    def picks(self, name: str) -> bool:
        """Whether a field is none of them."""
        return name not in self.names


def expand_options(function: Callable[..., None]) -> Callable[..., None]:
    """The function as typer takes it, its dataclasses spelled out; options stand in the order of their panels."""
    plain: list[inspect.Parameter] = []
    options: list[tuple[str, inspect.Parameter]] = []
    owners: dict[str, tuple[type, list[str], Callable[[dict[str, Any]], None]]] = {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        owner, *notes = get_args(parameter.annotation) or (parameter.annotation,)
        if not (is_dataclass(owner) and isinstance(owner, type)):
            plain.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        pick = next((note for note in notes if isinstance(note, Only)), Without(()))
        found = {name: one for name, one in option_specs(owner).items() if pick.picks(name)}
        owners[parameter.name] = owner, list(found), pick.check
        hints = get_type_hints(owner)
        options += [(one.panel, _parameter(name, one, owner, hints[name])) for name, one in found.items()]
    spoken = option_specs(OutputOptions)
    hints = get_type_hints(OutputOptions)
    options += [(one.panel, _parameter(name, one, OutputOptions, hints[name])) for name, one in spoken.items()]
    # Panels that plug-ins name stand last.
    options.sort(key=lambda one: _ORDER.index(one[0]) if one[0] in _ORDER else len(_ORDER))
    parameters = [*plain, *(parameter for _, parameter in options)]

    def command(**values: Any) -> None:
        made: dict[str, Any] = {}
        speech = OutputOptions(**{name: values.pop(name) for name in spoken})
        for name, (owner, names, check) in owners.items():
            given = {field: _read(owner, field, values.pop(field)) for field in names}
            check(given)
            made[name] = owner(**given)
        set_output_options(speech, any(getattr(one, "overwrite", False) for one in made.values()))
        function(**values, **made)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    # Arguments come first, whether a default follows or not; typer calls by name.
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        sorted(parameters, key=lambda one: one.default is not inspect.Parameter.empty)
    )
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameter(name: str, one: OptionSpec, owner: type, hint: Any) -> inspect.Parameter:
    """One option as a parameter of the command's function."""
    default = getattr(owner, name)
    shown: Any = one.default_text if one.default_text is not None else True
    if get_origin(hint) is tuple:
        hint, default = str, ",".join(default)
    how: dict[str, Any] = {"parser": _share_of(f"--{cli_name(name)}"), "metavar": "<float>"} if one.percent else {}
    what = typer.Option(f"--{cli_name(name)}", help=one.help, rich_help_panel=one.panel, show_default=shown, **how)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, what])


def _share_of(option: str) -> Callable[[str], float]:
    # Older typers ask for a name, which a partial function has not.
    def share(text: str) -> float:
        return parse_share(option, text)

    return share


def _read(owner: type, name: str, value: Any) -> Any:
    """A value as the dataclass takes it: lists are written with commas."""
    if isinstance(getattr(owner, name), tuple):
        return tuple(part.strip() for part in value.split(","))
    return value
