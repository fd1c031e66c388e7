"""Output formats by name: what a person may write behind `--format`.

A format is one file of this folder: a class under the decorator `@output_format`, which gives its name and all that is
needed of it before torch is loaded. So the decorator's arguments are literals, and are read off the sources.
"""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from secateur.base.errors import SecateurError
from secateur.base.output import Output

T = TypeVar("T", bound=type)
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Declaration:
    """An output format as a person meets it."""

    name: str
    help: str
    """What `--help` says of it."""
    suffix: str | None = None
    """The ending of the file's name; None for a folder."""
    uniform: bool = False
    """All blocks have one width."""
    types: tuple[str, ...] = ()
    """Names that `--type` takes, the default first, where tensors are stored in types of the format's own."""
    tokenizer: bool = False
    """The output cannot be written without a tokenizer."""
    file: str = ""
    """The module of this folder that has the class."""

    def output(self, out: Path, *, source: Path | None = None, overwrite: bool = False) -> Output:
        """Return the output as it will be written.

        Raises:
            SecateurError: the name is that of another format's file.
        """
        if self.suffix is not None:
            return Output(out, suffix=self.suffix, overwrite=overwrite)
        if other := next((one for one in FORMATS.values() if one.suffix and out.name.endswith(one.suffix)), None):
            raise SecateurError(f"{out}: a folder is to be written; add --format {other.name}, or name a folder")
        return Output(out, overwrite=overwrite, source=source)


def output_format(
    name: str,
    *,
    help: str,
    suffix: str | None = None,
    uniform: bool = False,
    types: tuple[str, ...] = (),
    tokenizer: bool = False,
) -> Callable[[T], T]:
    """Give a class of this folder the name and the properties that `Declaration` lists, all of them literals."""

    def register(kind: T) -> T:
        said = Declaration(name, help, suffix, uniform, types, tokenizer)
        kind.declaration = FORMATS.setdefault(name, said)  # type: ignore[attr-defined]
        CLASSES[name] = kind
        return kind

    return register


def default_format(uniform: bool) -> Declaration:
    """Return the format of an output where a person names none."""
    return FORMATS["stock" if uniform else "hf"]


def _declared(file: Path) -> Iterator[Declaration]:
    """Yield what the decorators of a source file say."""
    text = file.read_text(encoding="utf-8")
    if "\n@output_format(" not in text:
        return
    for node in ast.parse(text).body:
        for call in getattr(node, "decorator_list", ()):
            if isinstance(call, ast.Call) and getattr(call.func, "id", None) == output_format.__name__:
                said = {one.arg: ast.literal_eval(one.value) for one in call.keywords if one.arg}
                yield Declaration(ast.literal_eval(call.args[0]), file=file.stem, **said)


def _found() -> dict[str, Declaration]:
    """Return every format by its name: the default first, and folders before files."""
    found = [one for file in sorted(FOLDER.glob("[!_]*.py")) for one in _declared(file)]
    return {one.name: one for one in sorted(found, key=lambda one: (one.suffix is not None, one.uniform, one.name))}


FORMATS = _found()
CLASSES: dict[str, type] = {}
"""The classes of formats whose files have been imported."""
