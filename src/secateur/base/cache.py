"""Files in the cache of the user: dequantised models, cut vocabularies, measured times, descriptions of classes."""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from secateur.base.errors import SecateurError
from secateur.base.files import remove, replace_atomically, write_atomically
from secateur.base.hashes import hash_json

T = TypeVar("T")

_LIST = ".files.json"
"""File in each folder of the cache with the sizes of the others."""
ADVICE = "free some space, or set XDG_CACHE_HOME to another folder"
UNUSED_SECONDS = 30 * 86400
"""A cached folder that was not used for so long is deleted when another one is made."""


def cache_folder() -> Path:
    """Return the folder of the user's cache that belongs to secateur.

    Raises:
        SecateurError: The user has no home folder, for example in a container.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):
        raise SecateurError("this user has no home folder for a cache; set XDG_CACHE_HOME to a folder")
    return Path(home) / "secateur"


def cached_folder(name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder of the cache; the first call for a name makes it.

    Args:
        name: Name of the folder, which differs for different contents.
        make: Writes the contents into an empty folder.

    Raises:
        SecateurError: The cache cannot be written.
    """
    folder = cache_folder() / name
    if _is_whole(folder):
        with suppress(OSError):
            os.utime(folder)
        return folder
    remove(folder)
    _delete_unused()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Another process may finish first; its folder is as good as this one.
        with replace_atomically(folder, keep_existing=True, advice=ADVICE) as partial:
            partial.mkdir()
            make(partial)
            sizes = {str(file.relative_to(partial)): file.stat().st_size for file in partial.rglob("*")}
            (partial / _LIST).write_text(json.dumps(sizes), encoding="utf-8")
    except OSError as error:
        raise SecateurError(
            f"{folder.parent}: the cache cannot be written ({error.strerror or error}); {ADVICE}"
        ) from error
    return folder


def cached_value(folder: str, facts: Any, kind: type[T], make: Callable[[], T]) -> T:
    """Return a value of a dataclass, from the cache if that has one of the same facts; else it is made and kept.

    Args:
        folder: Name of the folder of such values.
        facts: Everything on which the value depends, as JSON can hold it.
        kind: The dataclass; pydantic checks the fields of cached values. Fields that JSON cannot hold have defaults.
        make: Computes the value.
    """
    adapter, name = _adapter(kind), f"{folder}/{hash_json(facts)}.json"
    with suppress(OSError, ValueError, SecateurError):
        return adapter.validate_json((cache_folder() / name).read_bytes())
    value = make()
    # If the folder is not writable, the next run computes the value again.
    with suppress(OSError, SecateurError):
        file = cache_folder() / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, adapter.dump_json(value, indent=1))
    return value


_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)
"""Pydantic's reader and writer of a dataclass; to build one takes longer than to read a file."""


def _is_whole(folder: Path) -> bool:
    """Return whether a folder of the cache has all its files; programs that delete old files may have taken some."""
    try:
        sizes = json.loads((folder / _LIST).read_text(encoding="utf-8"))
        return all((folder / name).is_dir() or (folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def clear_cache() -> tuple[Path, int]:
    """Delete everything in the cache, and return its folder and the number of bytes that were freed."""
    folder = cache_folder()
    freed = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
    remove(folder)
    return folder, freed


def _delete_unused() -> None:
    """Delete folders of the cache that were not used for a long time."""
    oldest = time.time() - UNUSED_SECONDS
    with suppress(OSError):
        for folder in cache_folder().iterdir():
            if folder.is_dir() and folder.stat().st_mtime < oldest:
                remove(folder)
