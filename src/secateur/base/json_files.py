"""JSON files, and JSON files with a hash that shows damage."""

import json
import os
from pathlib import Path
from typing import Any

from secateur.base.errors import SecateurError
from secateur.base.files import write_atomically
from secateur.base.hashes import hash_json


def parse_json(text: str | bytes, *, unique: bool = False) -> Any:
    """Return the value of a JSON text from outside; with `unique`, no object may have a key twice.

    Raises:
        ValueError: The text is not JSON, not UTF-8, nested too deeply for Python, or has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repeats if unique else None)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of a JSON text; raise `ValueError` if it has a key twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for place, (key, _) in enumerate(pairs) if key in dict(pairs[:place]))
        raise ValueError(f"{twice!r} is there twice")
    return found


def write_hashed(path: Path, value: Any) -> None:
    """Write a JSON value and its hash to a file that survives a power cut."""
    write_atomically(path, json.dumps({"hash": hash_json(value), "value": value}))
    _sync_folder(path.parent)


def read_hashed(path: Path) -> Any:
    """Return the value that `write_hashed` wrote.

    Raises:
        SecateurError: The file is missing or damaged.
    """
    try:
        content = parse_json(path.read_bytes())
        if content["hash"] == hash_json(content["value"]):
            return content["value"]
    except (ValueError, KeyError, TypeError, OSError):
        pass
    raise damaged_state(path)


def damaged_state(path: Path) -> SecateurError:
    """Return the error for a damaged part of a run's saved state."""
    return SecateurError(f"{path}: damaged, so the run cannot be resumed; add --restart to start over")


def _sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
