"""Files and folders that appear whole or not at all, the one check that they may be written, JSON and hashes."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.base.errors import SecateurError, StoppedError

if TYPE_CHECKING:
    pass

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


@contextlib.contextmanager
def replace_atomically(
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


def write_atomically(path: Path, contents: str | bytes) -> None:
    """A small file; what was there is replaced."""
    with replace_atomically(path) as partial, partial.open("wb") as file:
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


def leftovers(path: Path) -> list[Path]:
    """What runs that were killed have left beside a target, or others are still writing."""
    name = glob.escape(path.name)
    # A GGUF file is made from a folder with a hidden name of its own.
    patterns = (f".{name}.partial-*", f".{name}.folder-*", f"..{name}.folder-*.partial-*")
    return [left for pattern in patterns for left in path.parent.glob(pattern)]


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
