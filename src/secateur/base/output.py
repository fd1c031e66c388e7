"""The output of a command: checked before the work, complete after it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from secateur.base.errors import SecateurError, StoppedError
from secateur.base.files import held, hidden_sibling, is_held, leftovers, real_path, remove, replace_atomically
from secateur.base.json_files import parse_json
from secateur.base.model_files import MODEL_FILES
from secateur.base.words import first_few

_LONGEST_NAME = 200
"""Largest number of bytes of an output's name. The operating system allows 255, and hidden names are longer."""
_SPARE_BYTES = 16 * 2**20
"""Free space needed beyond the expected bytes of a folder, for configs and the tokenizer."""


@dataclass(frozen=True)
class Kind:
    """Kind of output: what may be replaced by another output of this kind, and nothing else."""

    what: str
    """Name of the kind, for error messages."""
    is_one: Callable[[Path], bool]
    """Whether a file or folder is of this kind."""
    files: tuple[str, ...] = ()
    """Patterns of all files in a folder of this kind."""


def json_kind(what: str, fits: Callable[[Any], bool], file: str = "", files: tuple[str, ...] = ()) -> Kind:
    """Return the kind of output that is known by the contents of a JSON file.

    Args:
        what: Name of the kind, for error messages.
        fits: Function that tells whether the contents of the JSON file are of this kind.
        file: Name of the file in a folder; empty if the output is the file.
        files: Patterns of all files in the folder.
    """

    def is_one(path: Path) -> bool:
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError, AttributeError):
            return fits(parse_json((path / file).read_bytes()))
        return False

    return Kind(what, is_one, files)


MODEL = json_kind(
    "a model folder (no config.json with a model_type)", lambda found: "model_type" in found, "config.json", MODEL_FILES
)
REPORT_KEY = "written_by"
REPORT = json_kind("a report that --json wrote", lambda found: found[REPORT_KEY].startswith("secateur "))


@dataclass
class Output:
    """File or folder that a command writes.

    As a context manager it yields the hidden path to write to, a new folder or an empty file, which replaces `path` at
    the end.
    """

    path: Path
    suffix: str | None = None
    """End of the file name, empty for any; None if the output is a folder."""
    overwrite: bool = False
    """Whether to replace an existing output of the same kind."""
    source: Path | None = None
    """Folder or file of the model that is read, which is never replaced."""
    expected_bytes: int = 0
    """Expected size, compared with the free space of the disk; 0 for no check."""
    kind: Kind = MODEL
    resume_path: Path | None = None
    """Hidden path of an unfinished run to resume."""
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False)

    def __post_init__(self) -> None:
        # Resolve symbolic links, so that a folder is replaced and not the link to it.
        self.path = real_path(self.path)
        self.source = None if self.source is None else real_path(self.source)

    def check(self) -> None:
        """Check that the output can be written, and leave no trace.

        Raises:
            SecateurError: The path is not a possible one, something there must not be replaced, the disk is too small,
                or the folder around the path is not writable.
        """
        self._check_before_writing()
        remove(self._create(hidden_sibling(self.path, "partial")))

    def __enter__(self) -> Path:
        with _resumable():
            self._check_before_writing()
        self._remove_leftovers()
        context = replace_atomically(self.path, _resumable()(self._check_target), resume_path=self.resume_path)
        partial = self._create(self._stack.enter_context(context))
        return self._stack.enter_context(held(partial))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _remove_leftovers(self) -> None:
        """Remove what killed runs have left, unless a run is writing the same output now."""
        # Not a whole folder, of which this run may be making a GGUF file.
        left = [path for path in leftovers(self.path) if ".partial-" in path.name]
        if not any(map(is_held, left)):
            for path in left:
                remove(path)

    def _create(self, partial: Path) -> Path:
        """Create the hidden folder or file, with the permissions of any other (unlike `tempfile.mkdtemp`)."""
        try:
            if self.suffix is None:
                partial.mkdir(exist_ok=self.resume_path is not None)
            else:
                partial.touch()
        except OSError as error:
            raise SecateurError(
                f"{self.path}: cannot write into {self.path.parent} ({error.strerror}); choose another path"
            ) from error
        return partial

    def _check_before_writing(self) -> None:
        self._check_target()
        self._check_disk()

    def _check_target(self) -> None:
        self._check_path()
        if self.path.exists():
            self._check_existing()

    def _check_disk(self) -> None:
        """Check that the disk has room for what is still to be written."""
        if not self.expected_bytes:
            return
        spare = _SPARE_BYTES if self.suffix is None else 0
        written = sum(file.stat().st_size for file in self.resume_path.rglob("*")) if self.resume_path else 0
        needed, free = self.expected_bytes + spare - written, shutil.disk_usage(self.path.parent).free
        if free < needed:
            raise SecateurError(
                f"{self.path}: needs {needed / 1e6:,.2f} MB of disk space, but {free / 1e6:,.2f} MB are free; "
                "free some space or choose another path"
            )

    def _check_path(self) -> None:
        """Check the path itself, whatever is there."""
        path, model, parent = self.path, self.source, self.path.parent
        nested = model is not None and (model in path.parents or path in model.parents)
        named = path.name.lower().endswith(self.suffix or "")
        self._refuse_if(len(os.fsencode(path.name)) > _LONGEST_NAME, "the name is too long; choose a shorter one")
        self._refuse_if(not named, f"the file name must end in {self.suffix}; rename it")
        kind = "file" if path.is_file() else "folder"
        self._refuse_if(path == model, f"this is the {kind} of MODEL, which would be replaced; choose another path")
        self._refuse_if(nested, "this path is inside the folder of MODEL, or contains it; choose another path")
        self._refuse_if(path == Path.cwd(), "this is the current folder, which cannot be replaced; choose a path in it")
        self._refuse_if(path.is_mount(), "this is a mount point, which cannot be replaced; choose a path in it")
        self._refuse_if(not parent.is_dir(), f"the folder {parent} does not exist; create it first")

    def _check_existing(self) -> None:
        """Check that the existing file or folder may be replaced."""
        path, is_folder = self.path, self.path.is_dir()
        entries = sorted(path.iterdir()) if is_folder else [path]
        foreign = [entry.name for entry in entries if is_folder and not _is_listed(entry, self.kind.files)]
        exists = "exists and is not empty" if is_folder else "exists"
        wrong_kind = f"a {'folder' if is_folder else 'file'} with this name exists; choose another name"
        self._refuse_if(is_folder == (self.suffix is not None), wrong_kind)
        self._refuse_if(not (is_folder or path.is_file()), "exists and is not a regular file; choose another name")
        self._refuse_if(not self.overwrite and entries != [], f"{exists}; choose another name or add --overwrite")
        self._refuse_if(
            foreign != [],
            f"not overwritten, because it contains other files ({first_few(foreign)}); choose another name",
        )
        self._refuse_if(
            entries != [] and not self.kind.is_one(path),
            f"not overwritten, because it is not {self.kind.what}; choose another name",
        )

    def _refuse_if(self, wrong: bool, reason: str) -> None:
        if wrong:
            raise SecateurError(f"{self.path}: {reason}")


@contextlib.contextmanager
def _resumable() -> Iterator[None]:
    """Turn an error into one after which the run is kept: another program has filled the disk, or has written there."""
    try:
        yield
    except SecateurError as error:
        raise StoppedError(str(error)) from error


def _is_listed(entry: Path, files: tuple[str, ...]) -> bool:
    """Return whether a file or folder is one of the files of a kind; of folders, only chat templates are."""
    if entry.is_dir():
        return entry.name in files and all(file.suffix == ".jinja" for file in entry.iterdir())
    return any(map(entry.match, files))
