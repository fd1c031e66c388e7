"""Writing files and folders completely or not at all, and small helpers for paths."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from secateur.base.errors import SecateurError, StoppedError


def local_path(name: str | Path) -> Path:
    """Return a path in which `~` is replaced by the home folder of the user, if there is such a user.

    Raises:
        SecateurError: The name is empty, which would be the current folder.
    """
    if name == "":
        raise SecateurError("the name of a file or folder is empty; name one, or . for the current folder")
    return Path(os.path.expanduser(name))


def real_path(name: str | Path) -> Path:
    """Return the absolute path behind `~` and symbolic links; a link that leads to itself stays as it is."""
    return Path(os.path.realpath(local_path(name)))


def existing_path(model: str | Path) -> Path | None:
    """Return the file or folder of a model; None for the id of a model on the hub."""
    path = local_path(model)
    return path if path.exists() else None


@contextlib.contextmanager
def replace_atomically(
    path: Path,
    check: Callable[[], None] = lambda: None,
    *,
    keep_existing: bool = False,
    resume_path: Path | None = None,
    advice: str | None = None,
) -> Iterator[Path]:
    """Yield a hidden path on which a file or a folder is written; it replaces `path` when the context ends.

    After an error, `path` is as it was, and the hidden file or folder is deleted.

    Args:
        path: Path to replace.
        check: Called just before the replacement, as another program may have written to `path` in the meantime.
        keep_existing: Keep a folder that another process has written to `path` in the meantime.
        resume_path: Hidden path to use, which is not deleted after an error; by default a new one next to `path`.
        advice: What to do when the disk is full.

    Raises:
        SecateurError: The disk is full, or the path cannot be written.
    """
    partial = resume_path or hidden_sibling(path, "partial")
    try:
        yield partial
        check()
        if not (keep_existing and path.is_dir()):
            _move(partial, path)
    except Exception as error:
        if is_disk_full(error):
            state = "nothing was written" if resume_path is None else "the run will resume"
            advice = advice or f"free some space and run the same command again ({state})"
            raise StoppedError(f"{path}: the disk is full; {advice}") from error
        if isinstance(error, OSError) and _failed_at(error, partial):
            raise SecateurError(f"{path}: cannot be written ({error.strerror}); choose another path") from error
        raise
    finally:
        if resume_path is None:
            remove(partial)


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Write a small file, or replace it, so that it survives a power cut."""
    # File names that are not valid UTF-8 are escaped.
    raw = contents.encode(errors="backslashreplace") if isinstance(contents, str) else contents
    with replace_atomically(path) as partial, partial.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())


def leftovers(path: Path) -> list[Path]:
    """Return hidden files and folders next to an output, from runs that were killed or are still at work.

    These are unfinished outputs, and replaced folders that are not deleted yet.
    """
    name = glob.escape(path.name)
    # A GGUF file is written by way of a folder, which has a hidden path of its own.
    patterns = [f".{name}.partial-*", f".{name}.folder-*", f"..{name}.folder-*.partial-*", f"..{name}.partial-*"]
    # Without an output, the run was killed before the new folder was there, and the old one is all that is left.
    if path.exists():
        patterns.append(f".{name}.old-*")
    return [left for pattern in patterns for left in path.parent.glob(pattern)]


@contextlib.contextmanager
def held(path: Path) -> Iterator[Path]:
    """Lock a file or folder, so that `is_held` is true of it in all processes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some file systems have no locks.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield path
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Return whether a process is writing a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    finally:
        os.close(descriptor)
    return False


def is_disk_full(error: BaseException) -> bool:
    """Return whether an exception is about a full disk or quota."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        # numpy gives no number: "1114112 requested and 926624 written".
        return error.errno in codes or (error.errno is None and "requested and" in str(error))
    # safetensors wraps the error of the operating system.
    return type(error).__name__ == "SafetensorError" and any(f"os error {code})" in str(error) for code in codes)


def hidden_sibling(path: Path, purpose: str) -> Path:
    """Return a new hidden path next to a path, and so on the same file system."""
    return path.with_name(f".{path.name}.{purpose}-{secrets.token_hex(4)}")


def remove(path: Path) -> None:
    """Delete a file or a folder with everything in it, as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _failed_at(error: OSError, path: Path) -> bool:
    """Return whether an error of the operating system is about a path.

    Errors without a number, and closed pipes, come from other libraries.
    """
    return error.errno not in (None, errno.EPIPE) and error.filename in (None, str(path))


def _move(partial: Path, path: Path) -> None:
    """Rename a hidden file or folder to `path`. A folder that was there is deleted afterwards, or restored on error."""
    if not partial.is_dir():
        partial.replace(path)
        return
    old = hidden_sibling(path, "old")
    try:
        with contextlib.suppress(FileNotFoundError):
            path.rename(old)
        partial.rename(path)
    except BaseException as error:
        if old.exists() and not path.exists():
            old.rename(path)
        if isinstance(error, OSError):
            raise SecateurError(f"{path}: cannot be replaced ({error.strerror}); choose another path") from error
        raise
    remove(old)
