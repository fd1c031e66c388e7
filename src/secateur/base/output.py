"""Output."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from secateur.base.errors import SecateurError
from secateur.base.files import _sibling, local_path, remove, replace_atomically
from secateur.base.json_files import parse_json
from secateur.base.words import first_few

_SPARE = 16 * 2**20
"""Room kept beside the expected bytes of a folder, for configs and the tokenizer."""


@dataclass
class Output:
    """An output of a command, checked before the work and whole after it.

    As a context manager it gives the hidden name to write under: a folder that is there already, or a file to create.
    """

    path: Path
    suffix: str | None = None
    """The ending of a file's name (empty for any); None for a folder."""
    overwrite: bool = False
    """Replace what is there: a file, a model folder, or a folder with nothing but `files`."""
    source: Path | None = None
    """The folder of the model being read, which the output must leave alone."""
    expected_bytes: int = 0
    """What will be written, to be compared with the free space."""
    file_names: Collection[str] | None = None
    """The names of all that a folder will hold, where that is no model."""
    resume_path: Path | None = None
    """The hidden name of what is gone on with where a run was stopped."""
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False)

    def __post_init__(self) -> None:
        # Through symbolic links, so that the folder itself is replaced and not a link to it.
        self.path = local_path(self.path).resolve()
        self.source = None if self.source is None else self.source.resolve()

    def check(self) -> None:
        """See that the output can be written, without leaving a trace.

        Raises:
            SecateurError: it would touch the source or other files, its folder is missing or not writable, or the
                disk is too small.
        """
        self._check_target()
        self._check_room()
        remove(self._reserve(_sibling(self.path, "partial")))

    def __enter__(self) -> Path:
        self._check_target()
        self._check_room()
        partial = self._stack.enter_context(replace_atomically(self.path, self._check_target, at=self.resume_path))
        return self._reserve(partial)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _reserve(self, partial: Path) -> Path:
        """The hidden name, taken. Not by mkdtemp, whose folders nobody else may read."""
        try:
            if self.suffix is None:
                partial.mkdir(exist_ok=self.resume_path is not None)
            else:
                partial.touch()
        except OSError as error:
            raise SecateurError(
                f"{self.path}: cannot write into {self.path.parent} ({error.strerror}); choose another place"
            ) from error
        return partial

    def _check_room(self) -> None:
        there = (file.stat().st_size for file in self.resume_path.rglob("*")) if self.resume_path else ()
        needed = self.expected_bytes + (_SPARE if self.suffix is None else 0) - sum(there)
        if self.expected_bytes and (free := shutil.disk_usage(self.path.parent).free) < needed:
            raise SecateurError(
                f"{self.path}: {needed / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free; make room"
            )

    def _check_target(self) -> None:
        """Everything that can be said of the target without writing."""
        path = self.path
        if self.suffix is not None and not path.name.lower().endswith(self.suffix):
            raise SecateurError(f"{path}: the file's name must end in {self.suffix}; name it so")
        if self.source is not None:
            _check_source(path, self.source)
        if path.is_mount() or path == Path.cwd():
            what = "the folder you are in" if path == Path.cwd() else "where a file system is mounted"
            raise SecateurError(f"{path}: this is {what}, which cannot be replaced; name a folder in it, not this one")
        if path.exists():
            self._check_present(path)
        if not path.parent.is_dir():
            raise SecateurError(f"{path}: the folder {path.parent} does not exist; create it first")

    def _check_present(self, path: Path) -> None:
        """What is at the target may be replaced."""
        if path.is_dir() != (self.suffix is None):
            here = "folder" if path.is_dir() else "file"
            raise SecateurError(f"{path}: a {here} is there; choose another name")
        if self.suffix is not None and not path.is_file():
            raise SecateurError(f"{path}: no regular file is there; choose another name")
        if path.is_file():
            if not self.overwrite:
                raise SecateurError(f"{path}: exists; choose another name, or overwrite it (--overwrite)")
            return
        present = sorted(file.name for file in path.iterdir())
        if not present:
            return
        if not self.overwrite:
            raise SecateurError(f"{path}: exists and is not empty; choose another name, or overwrite it (--overwrite)")
        others = [] if self.file_names is None else [name for name in present if name not in self.file_names]
        if others:
            raise SecateurError(
                f"{path}: not overwritten, as it holds other files ({first_few(others)}); choose another name"
            )
        if self.file_names is None and not _is_model(path):
            raise SecateurError(
                f"{path}: not overwritten, as it does not look like a model folder (no config.json with a model_type); "
                "choose another name"
            )


def _check_source(path: Path, source: Path) -> None:
    """The output leaves the model's own folder alone."""
    if path == source or path in source.parents or source in path.parents:
        place = "the model's own folder" if path == source else "inside or around the model's own folder"
        raise SecateurError(f"{path}: this is {place}, which would be lost or mixed up; choose another")


def _is_model(folder: Path) -> bool:
    """Whether a folder looks like a model, which overwriting may remove."""
    with contextlib.suppress(OSError, ValueError):
        config = parse_json((folder / "config.json").read_text(encoding="utf-8"))
        return isinstance(config, dict) and "model_type" in config
    return False
