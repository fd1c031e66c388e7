"""Folder of a comparison, with one small file for each finished run, from which a restarted comparison continues."""

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

from secateur.base.errors import SecateurError
from secateur.base.files import write_atomically
from secateur.base.hashes import hash_json
from secateur.base.json_files import parse_json

RUNS, SURVEYS, SCRATCH, LOCK = "runs", "surveys", ".scratch", ".lock"


class RunStore:
    """Store of finished runs by the hash of their inputs; as a context manager it locks the folder `path`.

    Pruned models are in the folder `scratch` until they are scored.
    """

    def __init__(self, path: Path):
        self.path, self.scratch = path, path / SCRATCH

    def check(self) -> None:
        """Check that the folder can be used, without writing to it.

        Raises:
            SecateurError: The folder holds something else, or its parent does not exist.
        """
        if self.path.exists() and not self.path.is_dir():
            raise SecateurError(f"{self.path}: a file with this name exists; choose another name")
        is_store = all((self.path / name).exists() for name in (RUNS, LOCK))
        if self.path.is_dir() and not is_store and any(self.path.iterdir()):
            raise SecateurError(f"{self.path}: holds other files, not a comparison; name a new folder")
        if not self.path.absolute().parent.is_dir():
            raise SecateurError(f"{self.path}: the folder {self.path.absolute().parent} does not exist; create it")

    def __enter__(self) -> "RunStore":
        self.check()
        for name in (RUNS, SURVEYS):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / LOCK).open("w")
        try:
            # The system releases the lock however the process ends.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise SecateurError(
                f"{self.path}: in use by another secateur compare; wait, or name another folder"
            ) from error
        # A killed process may have left models.
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)
        self._lock.close()

    def find(self, key: str) -> dict[str, Any] | None:
        """Return the result of a finished run, or None if there is none.

        Raises:
            SecateurError: The file of the result is damaged.
        """
        path = self.path / RUNS / f"{key}.json"
        if not path.exists():
            return None
        try:
            return dict(parse_json(path.read_text(encoding="utf-8"))["result"])
        except (ValueError, KeyError, TypeError) as error:
            raise SecateurError(f"{path}: not a result of secateur; delete the file to repeat its run") from error

    def keep(self, key: str, decided_by: dict[str, Any], result: dict[str, Any]) -> None:
        """Store a result, with the inputs that decide it."""
        contents = json.dumps({"decided_by": decided_by, "result": result}, indent=2) + "\n"
        write_atomically(self.path / RUNS / f"{key}.json", contents)

    def survey_file(self, decided_by: dict[str, Any]) -> Path:
        """Return the file of a survey, by the inputs that decide it."""
        return self.path / SURVEYS / f"{hash_json(decided_by)}.json"
