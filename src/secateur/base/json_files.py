"""JSON."""

import json
from pathlib import Path
from typing import Any

from secateur.base.errors import SecateurError
from secateur.base.files import _settle, write_atomically
from secateur.base.hashes import hash_json


def parse_json(text: str | bytes) -> Any:
    """The value of JSON that others may have written.

    Raises:
        ValueError: it is not JSON, not UTF-8, or nested more deeply than Python can follow.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def write_hashed(path: Path, value: Any) -> None:
    """A small file with a JSON value, whose damage shows when it is read."""
    write_atomically(path, json.dumps({"hash": hash_json(value), "value": value}))
    _settle(path.parent)


def read_hashed(path: Path) -> Any:
    """The value that `write_hashed` wrote.

    Raises:
        SecateurError: the file is not as it was written.
    """
    try:
        raw = parse_json(path.read_bytes())
        if raw["hash"] == hash_json(raw["value"]):
            return raw["value"]
    except (ValueError, KeyError, TypeError, OSError):
        pass
    raise damaged_state(path)


def damaged_state(path: Path) -> SecateurError:
    """What to say of a part of a run's state that is not as it was written."""
    return SecateurError(f"{path}: damaged, so that the run cannot go on from there; add --restart to begin anew")
