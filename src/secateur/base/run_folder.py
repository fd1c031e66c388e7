"""The state of an unfinished run, in a hidden folder beside its output, from which the same command resumes.

Results of steps are JSON files; the checkpoint of a long step is a folder of its own
(`secateur.model.pass_checkpoint`). One process holds the folder at a time: the system gives its lock back whatever ends
the process.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from secateur.base.errors import SecateurError, StoppedError
from secateur.base.json_files import read_hashed, write_hashed

REQUEST, ROWS, LOCK = "asked", "rows", "lock"
PARTIAL_OUTPUT = "model"
"""The folder in which the output grows."""


class RunFolder:
    """The state of one run, as a context manager: gone when the run is through, kept where it was stopped."""

    def __init__(self, out: Path, asked: dict[str, Any], *, restart: bool = False):
        """Nothing is written yet.

        Args:
            out: what the run makes.
            asked: all that decides the result, by the names that a person gives it.
            restart: forget what is there.
        """
        self.path = run_folder_path(out)
        self._asked, self._restart = json.loads(json.dumps(asked)), restart
        self._lock = -1

    def __enter__(self) -> "RunFolder":
        """Take the folder.

        Raises:
            SecateurError: another process has it, it is of another run, or it is damaged.
        """
        try:
            self._take()
            if self._restart:
                self._clear()
            asked = self.path / f"{REQUEST}.json"
            if asked.exists():
                self._compare(read_hashed(asked))
            else:
                # What was begun before the question was down is of no use.
                self._clear()
                write_hashed(asked, self._asked)
        except BaseException:
            self._give_back()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not (error and self.is_kept_after(error)):
            shutil.rmtree(self.path, ignore_errors=True)
        self._give_back()

    def clean(self) -> None:
        """Remove what is there, unless another process is at work.

        Raises:
            SecateurError: one is.
        """
        if self.path.exists():
            try:
                self._take()
                shutil.rmtree(self.path)
            finally:
                self._give_back()

    def result(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a step's result as JSON holds it; it is made unless it is there. The step's checkpoint is removed."""
        file = self.path / f"{name}.json"
        if not file.exists():
            write_hashed(file, make())
        shutil.rmtree(self.folder(name), ignore_errors=True)
        return read_hashed(file)

    def has_result(self, name: str) -> bool:
        """Whether a step's result is there."""
        return (self.path / f"{name}.json").exists()

    def folder(self, name: str) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.path / name

    def has_results(self) -> bool:
        """Whether there is anything that took time."""
        return any(file.suffix == ".json" and file.stem not in (REQUEST, ROWS) for file in self.path.rglob("*"))

    def is_kept_after(self, error: BaseException) -> bool:
        """Whether the folder stays after an error: what we object to would come again, what was interrupted goes on."""
        return self.has_results() and (isinstance(error, StoppedError) or not isinstance(error, SecateurError))

    def _take(self) -> None:
        try:
            self.path.mkdir(exist_ok=True)
            self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise SecateurError(f"{self.path}: cannot be written ({error.strerror}); choose another place") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SecateurError(
                f"{self.path}: another run is at work there; wait for it, or name another OUT"
            ) from error
        except OSError:
            # A file system without locks: what is left is to trust people.
            pass
        if not (self.path / LOCK).exists():
            raise SecateurError(f"{self.path}: another run has just ended there; run again")

    def _give_back(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _clear(self) -> None:
        for one in self.path.iterdir():
            if one.is_dir():
                shutil.rmtree(one)
            elif one.name != LOCK:
                one.unlink()

    def _compare(self, there: dict[str, Any]) -> None:
        """Refuse a run that asked for something else."""
        for name in [*self._asked, *there]:
            before, now = there.get(name), self._asked.get(name)
            if before != now:
                raise SecateurError(
                    f"{self.path}: holds a run with {name} {_shown(before)}, now {_shown(now)}; ask for the same to go "
                    "on with it, or add --restart to begin anew"
                )


def run_folder_path(out: Path) -> Path:
    """Where the state of the run that makes `out` lies."""
    return out.with_name(f".{out.name}.run")


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
