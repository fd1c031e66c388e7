"""Files and folders that appear whole or not at all, the one check that they may be written, JSON and hashes."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import yaml

from secateur.base.errors import SecateurError, StoppedError
from secateur.base.words import some

if TYPE_CHECKING:
    from torch import Tensor

_MOST_ENTRIES = 1_000_000
"""Of a YAML file, whose aliases make much of few lines."""
_SPARE = 16 * 2**20
"""Room kept beside the expected bytes of a folder, for configs and the tokenizer."""


def local_path(name: str | Path) -> Path:
    """A path as a shell reads it: `~` is a home, where there is such a user."""
    return Path(os.path.expanduser(name))


def cache_folder() -> Path:
    """The user's cache of secateur: dequantised models, and whatever else is worth keeping from run to run.

    Raises:
        SecateurError: the user has no home, as may be in a container.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):
        raise SecateurError("this user has no home to keep a cache in; set XDG_CACHE_HOME to a folder")
    return Path(home) / "secateur"


def parse_json(text: str | bytes) -> Any:
    """The value of JSON that others may have written.

    Raises:
        ValueError: it is not JSON, not UTF-8, or nested more deeply than Python can follow.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def digest(decided_by: Any) -> str:
    """A short name for what decides a result, as JSON holds it, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()[:16]


def hash_of(rows: Tensor) -> str:
    """What tells rows (rows x length) from others, 16 hexadecimal digits."""
    return hashlib.sha256(repr(tuple(rows.shape)).encode() + rows.numpy().tobytes()).hexdigest()[:16]


@contextlib.contextmanager
def whole(
    path: Path,
    check: Callable[[], None] = lambda: None,
    *,
    keep: bool = False,
    at: Path | None = None,
    advice: str | None = None,
) -> Iterator[Path]:
    """A hidden name beside a path, for a file or a folder to be written under.

    On a clean exit what is there takes the path's place, and what was at the path is removed after that; on any other
    exit it is removed, and the path stays as it was.

    Args:
        path: the target.
        check: called just before the replacement: what has come to be there since the start may not be ours to remove.
        keep: a folder that has come to be there since the start is as good as this one and stays.
        at: the hidden name, for what is gone on with where it was left; it is never removed.
        advice: for a full disk.

    Raises:
        SecateurError: the disk is full, or the path cannot be written.
    """
    partial = at or _sibling(path, "partial")
    try:
        yield partial
        check()
        if not (keep and path.is_dir()):
            _put_in_place(partial, path)
    except Exception as error:
        if is_disk_full(error):
            left = "nothing was left there" if at is None else "it goes on where it was"
            raise StoppedError(f"{path}: the disk is full; {advice or f'make room and run again ({left})'}") from error
        ours = isinstance(error, OSError) and error.filename in (None, str(partial))
        # A closed pipe, or words in place of a number, is some other library's.
        if isinstance(error, OSError) and ours and error.errno not in (None, errno.EPIPE):
            raise SecateurError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
        raise
    finally:
        if at is None:
            remove(partial)


def write_whole(path: Path, contents: str | bytes) -> None:
    """A small file; what was there is replaced."""
    with whole(path) as partial, partial.open("wb") as file:
        # Names of files that are no UTF-8 may stand in it.
        file.write(contents.encode(errors="backslashreplace") if isinstance(contents, str) else contents)
        file.flush()
        os.fsync(file.fileno())


def _settle(folder: Path) -> None:
    """See to it that the names in a folder outlive the power."""
    entry = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)


def write_hashed(path: Path, value: Any) -> None:
    """A small file with a JSON value, whose damage shows when it is read."""
    write_whole(path, json.dumps({"hash": digest(value), "value": value}))
    _settle(path.parent)


def read_hashed(path: Path) -> Any:
    """The value that `write_hashed` wrote.

    Raises:
        SecateurError: the file is not as it was written.
    """
    try:
        raw = parse_json(path.read_bytes())
        if raw["hash"] == digest(raw["value"]):
            return raw["value"]
    except (ValueError, KeyError, TypeError, OSError):
        pass
    raise damaged(path)


def damaged(path: Path) -> SecateurError:
    """What to say of a part of a run's state that is not as it was written."""
    return SecateurError(f"{path}: damaged, so that the run cannot go on from there; add --restart to begin anew")


@dataclass
class Output:
    """An output of a command, checked before the work and whole after it.

    As a context manager it gives the hidden name to write under: a folder that is there already, or a file to create.
    """

    path: Path
    file: str | None = None
    """The ending of a file's name (empty for any); None for a folder."""
    overwrite: bool = False
    """Replace what is there: a file, a model folder, or a folder with nothing but `files`."""
    source: Path | None = None
    """The folder of the model being read, which the output must leave alone."""
    expected_bytes: int = 0
    """What will be written, to be compared with the free space."""
    files: Collection[str] | None = None
    """The names of all that a folder will hold, where that is no model."""
    at: Path | None = None
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
        partial = self._stack.enter_context(whole(self.path, self._check_target, at=self.at))
        return self._reserve(partial)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _reserve(self, partial: Path) -> Path:
        """The hidden name, taken. Not by mkdtemp, whose folders nobody else may read."""
        try:
            if self.file is None:
                partial.mkdir(exist_ok=self.at is not None)
            else:
                partial.touch()
        except OSError as error:
            raise SecateurError(
                f"{self.path}: cannot write into {self.path.parent} ({error.strerror}); choose another place"
            ) from error
        return partial

    def _check_room(self) -> None:
        there = (file.stat().st_size for file in self.at.rglob("*")) if self.at else ()
        needed = self.expected_bytes + (_SPARE if self.file is None else 0) - sum(there)
        if self.expected_bytes and (free := shutil.disk_usage(self.path.parent).free) < needed:
            raise SecateurError(
                f"{self.path}: {needed / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free; make room"
            )

    def _check_target(self) -> None:
        """Everything that can be said of the target without writing."""
        path = self.path
        if self.file is not None and not path.name.lower().endswith(self.file):
            raise SecateurError(f"{path}: the file's name must end in {self.file}; name it so")
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
        if path.is_dir() != (self.file is None):
            here = "folder" if path.is_dir() else "file"
            raise SecateurError(f"{path}: a {here} is there; choose another name")
        if self.file is not None and not path.is_file():
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
        others = [] if self.files is None else [name for name in present if name not in self.files]
        if others:
            raise SecateurError(
                f"{path}: not overwritten, as it holds other files ({some(others)}); choose another name"
            )
        if self.files is None and not _is_model(path):
            raise SecateurError(
                f"{path}: not overwritten, as it does not look like a model folder (no config.json with a model_type); "
                "choose another name"
            )


def leftovers(path: Path) -> list[Path]:
    """What runs that were killed have left beside a target, or others are still writing."""
    name = glob.escape(path.name)
    # A GGUF file is made from a folder with a hidden name of its own.
    patterns = (f".{name}.partial-*", f".{name}.folder-*", f"..{name}.folder-*.partial-*")
    return [left for pattern in patterns for left in path.parent.glob(pattern)]


def read_yaml(path: Path, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """What a YAML file holds.

    Raises:
        SecateurError: it is no YAML, with the line, or holds more than any file of ours.
    """
    text = path.read_text(encoding="utf-8")
    try:
        found = yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        raise SecateurError(f"{path}{where}: not YAML ({getattr(error, 'problem', error)}); correct it") from error
    except RecursionError as error:
        raise SecateurError(f"{path}: nested too deeply; correct it") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        # A day that no month has, a number with more digits than Python reads.
        raise SecateurError(f"{path}: a value in it cannot be read ({error}); correct it") from error
    if _entries(found, {}) > _MOST_ENTRIES:
        raise SecateurError(f"{path}: its aliases come to more than {_MOST_ENTRIES:,} entries; write out what is meant")
    return found


def _entries(value: Any, known: dict[int, float]) -> float:
    """Entries of a value, as often as they are seen; infinitely many where it is part of itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_entries(one, known) for one in inner)
    return known[id(value)]


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception says that there is no room; the safetensors library wraps the system's error."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in codes
    wrapped = type(error).__name__ == "SafetensorError"
    return wrapped and any(f"os error {code})" in str(error) for code in codes)


def _sibling(path: Path, purpose: str) -> Path:
    """A new hidden name beside a path, on the same file system."""
    return path.with_name(f".{path.name}.{purpose}-{secrets.token_hex(4)}")


def _put_in_place(partial: Path, path: Path) -> None:
    """Give a hidden file or folder the target's name; an old folder is removed only after that."""
    if not partial.is_dir():
        partial.replace(path)
        return
    old = _sibling(path, "old") if path.exists() else None
    try:
        if old is not None:
            path.rename(old)
        partial.rename(path)
    except BaseException as error:
        if old is not None and old.exists() and not path.exists():
            old.rename(path)
        if isinstance(error, OSError):
            raise SecateurError(f"{path}: cannot be put in place ({error.strerror})") from error
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def remove(path: Path) -> None:
    """A file or a folder with all that is in it, as far as that is possible."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


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
