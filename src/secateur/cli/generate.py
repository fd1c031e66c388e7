"""Options of a command from dataclasses: each declared field becomes one command-line option.

A command is a plain function with dataclasses as parameters: `Options`, `RunOptions` or any other whose fields are
declared by `secateur.base.options.option`. On the command line, each field is an option; the function gets an object of
the dataclass. `Only(...)` in the annotation of a parameter selects some of the fields.
"""

import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from secateur.base.errors import SecateurError
from secateur.base.files import local_path
from secateur.base.options import OptionSpec, cli_name, option_specs
from secateur.cli import terminal
from secateur.cli.terminal import MESSAGES, OutputOptions, set_output_options
from secateur.steps.options import RunOptions

WHAT_TO_MEASURE = "What to measure"
"""Panel of the options that select measurements."""
_PANELS = ("Target", "Method", "Calibration", WHAT_TO_MEASURE, "Training", "Output", "Computing", MESSAGES)
"""Panels in the order of the help; the panel of the paper's variants follows."""
JSON_ONLY = {"overwrite": {"help": "Replace the file of --json, if secateur wrote it."}}
"""Help of `--overwrite` in commands without another output."""


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="The model: a folder in Hugging Face format, a hub id (owner/name) or a .gguf file.",
        show_default=False,
    ),
]
PrunedFolder = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="The folder of a pruned, trimmed or retrained model.", show_default=False),
]
ScoredTokens = Annotated[
    int,
    typer.Option(
        help="Number of tokens to score, from the start of each text; 0 for all.",
        min=0,
        rich_help_panel=WHAT_TO_MEASURE,
    ),
]


@dataclass(frozen=True)
class Only:
    """Selection of the fields that a command has as options."""

    names: Collection[str]
    ignored: Collection[str] = ()
    """Fields that the command accepts and ignores, so that options can be copied from another command."""
    texts: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Entries of a field's `OptionSpec` that differ in this command, such as `help`, by name of the field."""
    check: Callable[[dict[str, Any]], None] = lambda _: None
    """Check of the values that only this command makes, before the dataclass makes its own."""


def other_options(owner: type, *names: str) -> list[str]:
    """Return the names of all options of a dataclass but some."""
    return [name for name in option_specs(owner) if name not in names]


@dataclass(frozen=True)
class _Group:
    """Dataclass of options behind one parameter of a command."""

    owner: type
    selection: Only

    @property
    def specs(self) -> dict[str, OptionSpec]:
        selected = {name: spec for name, spec in option_specs(self.owner).items() if name in self.selection.names}
        return {name: spec._replace(**self.selection.texts.get(name, {})) for name, spec in selected.items()}

    def parameters(self) -> list[tuple[str, inspect.Parameter]]:
        """Return the panel and the parameter of each option; ignored options are hidden from the help."""
        hints, specs = get_type_hints(self.owner), option_specs(self.owner) | self.specs
        hidden = self.selection.ignored
        return [
            (specs[name].panel, _parameter(self.owner, name, specs[name], hints[name], name in hidden))
            for name in (*self.specs, *hidden)
        ]

    def build(self, values: dict[str, Any]) -> Any:
        """Remove the values of the options from `values`, and return an object of the dataclass made from them."""
        own = {name: values.pop(name) for name in self.specs}
        self.selection.check(own)
        return self.owner(**own)

    def ignored(self, values: dict[str, Any]) -> list[str]:
        """Remove the values of the ignored options from `values`, and return the options that were given."""
        given = {name: values.pop(name) for name in self.selection.ignored}
        return [f"--{cli_name(name)}" for name, value in given.items() if value != _default(self.owner, name)]


def expand_options(function: Callable[..., None]) -> Callable[..., None]:
    """Return a function for typer in which each dataclass parameter is replaced by its options, sorted by panel."""
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    groups = {parameter.name: group for parameter in parameters if (group := _group(parameter.annotation))}
    output, of_json = _Group(OutputOptions, Only(other_options(OutputOptions))), list[_Group]()
    if not any("overwrite" in group.specs for group in groups.values()):
        of_json = [_Group(RunOptions, Only(("overwrite",), texts=JSON_ONLY))]
    options = [entry for group in (*groups.values(), output, *of_json) for entry in group.parameters()]
    options.sort(key=lambda entry: _PANELS.index(entry[0]) if entry[0] in _PANELS else len(_PANELS))
    expanded = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters if one.name not in groups]
    expanded += [parameter for _, parameter in options]

    def command(**values: Any) -> None:
        if "" in sys.argv and Path() in values.values():
            # typer makes the current folder of an empty name.
            local_path("")
        # The shell replaces ~ in `--out ~/x`, but not in `--out=~/x`.
        values = {name: local_path(value) if isinstance(value, Path) else value for name, value in values.items()}
        output_options = output.build(values)
        ignored = [option for group in groups.values() for option in group.ignored(values)]
        built = {name: group.build(values) for name, group in groups.items()}
        all_built = [*built.values(), *(group.build(values) for group in of_json)]
        given = [*values.values(), *(value for one in all_built for value in vars(one).values())]
        paths = [value for value in given if isinstance(value, Path)]
        set_output_options(output_options, any(getattr(one, "overwrite", False) for one in all_built), paths)
        if ignored:
            terminal.log.print(f"Without effect on {function.__name__}: {', '.join(ignored)}")
        function(**values, **built)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    # Parameters without a default first, as a signature needs them; typer calls by name.
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        sorted(expanded, key=lambda one: one.default is not inspect.Parameter.empty)
    )
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in expanded}
    return command


def _group(annotation: Any) -> _Group | None:
    """Return the group of options behind an annotation, or None if it is an ordinary parameter."""
    owner, *notes = get_args(annotation) or (annotation,)
    if not (is_dataclass(owner) and isinstance(owner, type)):
        return None
    return _Group(owner, *(notes or [Only(other_options(owner))]))


def _parameter(owner: type, name: str, spec: OptionSpec, hint: Any, hidden: bool) -> inspect.Parameter:
    """Return the parameter of the command's function for one option."""
    flag, default = f"--{cli_name(name)}", _default(owner, name)
    shown: Any = True if spec.default_text is None else spec.default_text
    if get_origin(hint) is tuple:
        hint = str
    parsing: dict[str, Any] = {"parser": _fraction_parser(flag), "metavar": "<float>"} if spec.percent else {}
    declared = typer.Option(
        flag, help=spec.help, rich_help_panel=spec.panel, show_default=shown, hidden=hidden, **parsing
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, declared]
    )


def _fraction_parser(flag: str) -> Callable[[str], float]:
    # Not functools.partial: older typers need a function with a name.
    def parse(text: str) -> float:
        try:
            return fraction(text)
        except ValueError:
            raise SecateurError(f"{flag} is '{text}'; write a fraction such as 0.25 or 25%") from None

    return parse


def fraction(text: str) -> float:
    """Return a fraction that is written as 0.25 or as 25%; raise `ValueError` if the text is neither."""
    number, sign, rest = text.strip().partition("%")
    if rest:
        raise ValueError
    return float(number) / 100 if sign else float(number)


def _default(owner: type, name: str) -> Any:
    """Return an option's default as the command line has it: tuples are written with commas."""
    default = getattr(owner, name)
    return ",".join(default) if isinstance(default, tuple) else default
