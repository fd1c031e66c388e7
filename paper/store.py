"""Folder of a comparison, with one small file for each finished run, from which a restarted comparison continues."""

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur import SecateurError


class Store:
    """Store of finished runs by the hash of their inputs; as a context manager it locks the folder `path`.

    Pruned models are in the folder `scratch` until they are scored.
    """

    def __init__(self, path: Path):
        self.path, self.scratch = path, path / ".scratch"

    def check(self) -> None:
        """Check that the folder can be used, without writing to it.

        Raises:
            SecateurError: The folder holds something else, or its parent does not exist.
        """
        is_store = all((self.path / name).exists() for name in ("runs", ".lock"))
        if self.path.exists() and not is_store and not _is_empty_folder(self.path):
            raise SecateurError(f"{self.path}: exists and is not the folder of a comparison; name a new folder")
        if not self.path.absolute().parent.is_dir():
            raise SecateurError(f"{self.path}: the folder {self.path.absolute().parent} does not exist; create it")

    def __enter__(self) -> "Store":
        for name in ("runs", "surveys"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("w")
        try:
            # The system releases the lock however the process ends.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise SecateurError(f"{self.path}: in use by another comparison; wait, or name another folder") from error
        # A killed process may have left models.
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)
        self._lock.close()

    def find(self, key: str) -> dict[str, Any] | None:
        """Return the result of a finished run, or None if there is none."""
        path = self.path / "runs" / f"{key}.json"
        return dict(json.loads(path.read_text())["result"]) if path.exists() else None

    def keep(self, key: str, inputs: dict[str, Any], result: dict[str, Any]) -> None:
        """Store a result, with the inputs that decide it and whose hash is the key."""
        contents = json.dumps({"decided_by": inputs, "result": result}, indent=2) + "\n"
        write(self.path / "runs" / f"{key}.json", contents)

    def survey_file(self, inputs: dict[str, Any]) -> Path:
        """Return the file of a survey, by the inputs that decide it."""
        return self.path / "surveys" / f"{hash_json(inputs)}.json"


def write(path: Path, contents: str | bytes) -> None:
    """Write a file, or replace it at once, so that a killed process leaves no part of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    os.replace(partial, path)


def hash_json(value: Any) -> str:
    """Return a short hash of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def hash_rows(rows: Tensor) -> str:
    """Return a short hash of token ids (rows x length)."""
    return hashlib.sha256(repr(tuple(rows.shape)).encode() + rows.numpy().tobytes()).hexdigest()[:16]


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
