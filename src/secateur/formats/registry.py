"""Output formats by name, as in `--format`.

A format is one file of this folder: a class under the decorator `@output_format`, which declares the name and whatever
is needed before torch is loaded. The decorator's arguments are literals, so that they can be read from the source
without importing the file.
"""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from secateur.base.errors import SecateurError
from secateur.base.output import Kind, Output

T = TypeVar("T", bound=type)
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Declaration:
    """Properties of an output format that are known before its class is imported."""

    name: str
    help: str
    """Description in `--help`."""
    suffix: str | None = None
    """Ending of the file's name; None for a folder."""
    magic: str = ""
    """First characters of every file of the format; a file with others is not replaced."""
    uniform: bool = False
    """Whether the format holds only models whose blocks all have one width."""
    types: tuple[str, ...] = ()
    """Values of `--type`, the default first, if the format has types of tensors."""
    tokenizer: bool = False
    """Whether the output cannot be written without a tokenizer."""
    file: str = ""
    """Module of this folder that has the class."""

    def output(self, out: Path, *, source: Path | None = None, overwrite: bool = False) -> Output:
        """Return the output that is to be written.

        Args:
            out: The file or folder.
            source: Folder or file of the dense model, which the output must not touch.
            overwrite: Replace an output that exists.

        Raises:
            SecateurError: The name has the ending of another format's file.
        """
        if self.suffix is not None:
            # A file may be written into the folder of the model.
            file = source if source is not None and source.is_file() else None
            kind = Kind(f"a {self.name} file", self._is_one)
            return Output(out, suffix=self.suffix, overwrite=overwrite, source=file, kind=kind)
        if other := next((one for one in FORMATS.values() if one.suffix and out.name.endswith(one.suffix)), None):
            raise SecateurError(
                f"{out}: the format {self.name} writes a folder; add --format {other.name}, or leave out {other.suffix}"
            )
        return Output(out, overwrite=overwrite, source=source)

    def _is_one(self, path: Path) -> bool:
        """Return whether a file is of this format."""
        with path.open("rb") as file:
            return file.read(len(self.magic)) == self.magic.encode()


def output_format(
    name: str,
    *,
    help: str,
    suffix: str | None = None,
    magic: str = "",
    uniform: bool = False,
    types: tuple[str, ...] = (),
    tokenizer: bool = False,
) -> Callable[[T], T]:
    """Return the decorator that registers a class of this folder as an output format.

    The arguments are fields of `Declaration`, and must be literals.
    """

    def register(kind: T) -> T:
        declaration = Declaration(name, help, suffix, magic, uniform, types, tokenizer)
        kind.declaration = FORMATS.setdefault(name, declaration)  # type: ignore[attr-defined]
        CLASSES[name] = kind
        return kind

    return register


def default_format(uniform: bool) -> Declaration:
    """Return the format of a run without `--format`, for uniform or other widths."""
    return FORMATS["stock" if uniform else "hf"]


def _declarations_in(file: Path) -> Iterator[Declaration]:
    """Yield the declarations in a source file."""
    text = file.read_text(encoding="utf-8")
    if "\n@output_format(" not in text:
        return
    for node in ast.parse(text).body:
        for call in getattr(node, "decorator_list", ()):
            if isinstance(call, ast.Call) and getattr(call.func, "id", None) == output_format.__name__:
                fields = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
                yield Declaration(ast.literal_eval(call.args[0]), file=file.stem, **fields)


def _declarations() -> dict[str, Declaration]:
    """Return every declaration by name: the default format first, and folders before files."""
    all_of_them = [one for file in sorted(FOLDER.glob("[!_]*.py")) for one in _declarations_in(file)]
    ordered = sorted(all_of_them, key=lambda one: (one.suffix is not None, one.uniform, one.name))
    return {declaration.name: declaration for declaration in ordered}


FORMATS = _declarations()
CLASSES: dict[str, type] = {}
"""Classes of formats whose files have been imported."""
