"""The state of an unfinished run, in a hidden folder next to its output, from which the same command resumes.

The result of a step is a JSON file; the checkpoint of a long step is a subfolder (`secateur.model.pass_checkpoint`).
One process at a time locks the folder. The operating system releases the lock however the process ends.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from secateur.base.errors import SecateurError, StoppedError
from secateur.base.files import is_disk_full, remove
from secateur.base.json_files import read_hashed, write_hashed

REQUEST, ROWS, CHOICE, LOCK = "request", "rows", "choice", "lock"
"""Names of the files with the request, with the hashes of the calibration rows, with what depends on the free memory,
and with the lock."""
PARTIAL_OUTPUT = "model"
"""Name of the subfolder in which the output is written."""


class RunFolder:
    """Folder with the state of one run.

    A context manager: when the context ends, the folder is deleted, unless the run was stopped and can be resumed.
    """

    def __init__(self, out: Path, request: dict[str, Any], *, restart: bool = False):
        """Prepare the folder without writing anything.

        Args:
            out: Output of the run.
            request: Everything that decides the result, by the names that the user knows.
            restart: Delete the state of an earlier run.
        """
        self.path = run_folder_path(out)
        self._request, self._restart = json.loads(json.dumps(request)), restart
        self._lock_file: int | None = None
        self._had_results = False

    def __enter__(self) -> "RunFolder":
        """Create or resume the folder, and lock it.

        Raises:
            SecateurError: Another process has locked it, it belongs to another request, or it is damaged.
        """
        request_file = self.path / f"{REQUEST}.json"
        try:
            self._lock()
            # Anything written before the request was complete is of no use.
            if self._restart or not request_file.exists():
                self._clear()
                write_hashed(request_file, self._request)
            self._check_request(read_hashed(request_file))
            self._had_results = self.has_results()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not (error and self.is_kept_after(error)):
            shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()

    def clean(self) -> None:
        """Delete the folder.

        Raises:
            SecateurError: Another process has locked it.
        """
        if self.path.exists():
            try:
                self._lock()
                shutil.rmtree(self.path)
            finally:
                self._unlock()

    def result(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the result of a step, as JSON holds it, and delete the checkpoint of the step.

        Args:
            name: Name of the step.
            make: Computes the result if it is not saved yet.
        """
        file = self.path / f"{name}.json"
        if not file.exists():
            write_hashed(file, make())
        shutil.rmtree(self.folder(name), ignore_errors=True)
        return read_hashed(file)

    def has_result(self, name: str) -> bool:
        """Return whether the result of a step is saved."""
        return (self.path / f"{name}.json").exists()

    def folder(self, name: str) -> Path:
        """Return the folder for the checkpoint of a step."""
        return self.path / name

    def has_results(self) -> bool:
        """Return whether the folder holds anything that took time to compute."""
        return any(file.suffix == ".json" and file.stem not in (REQUEST, ROWS, CHOICE) for file in self.path.rglob("*"))

    def is_kept_after(self, error: BaseException) -> bool:
        """Return whether the folder is kept after an error: an interrupted run can be resumed, a wrong request not.

        A wrong request, such as one with too little memory, does not delete what an earlier run has computed.
        """
        is_wrong_request = isinstance(error, SecateurError) and not isinstance(error, StoppedError)
        return self.has_results() and (self._had_results or not is_wrong_request)

    def _lock(self) -> None:
        try:
            self.path.mkdir(exist_ok=True)
            self._lock_file = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise SecateurError(f"{self.path}: cannot be written ({error.strerror}); choose another OUT") from error
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SecateurError(
                f"{self.path}: another run is using this folder; wait until it ends, or choose another OUT"
            ) from error
        except OSError:
            # The file system has no locks, so two runs with the same OUT are not noticed.
            pass
        if not (self.path / LOCK).exists():
            raise SecateurError(f"{self.path}: another run has just deleted this folder; run the same command again")

    def _unlock(self) -> None:
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def _clear(self) -> None:
        """Delete everything in the folder but the lock."""
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()

    def _check_request(self, saved: dict[str, Any]) -> None:
        """Check that the saved request is the one of this run.

        Raises:
            SecateurError: It is not; the message names the first difference.
        """
        for name in [*self._request, *saved]:
            before, now = saved.get(name), self._request.get(name)
            if before != now:
                raise SecateurError(
                    f"{self.path}: the unfinished run has {name} {_shown(before)}, this command has {_shown(now)}; use "
                    "the same value to resume it, or add --restart to start over"
                )


@contextmanager
def saving_state(place: Path, unfinished: Path | None = None) -> Iterator[None]:
    """Say how the run is resumed if its state cannot be written, and delete what is unfinished.

    Args:
        place: File or folder to name in the message.
        unfinished: File or folder that is being written.

    Raises:
        StoppedError: The disk is full, or the state cannot be written for another reason.
    """
    try:
        yield
    except Exception as error:
        if unfinished is not None:
            remove(unfinished)
        if is_disk_full(error):
            why = "the disk is full; free some space"
        elif isinstance(error, OSError):
            why = f"cannot be written ({error}); correct that"
        else:
            raise
        raise StoppedError(f"{place}: {why} and run the same command again, which resumes the run") from error


def run_folder_path(out: Path) -> Path:
    """Return the path of the folder for the run that writes `out`."""
    return out.with_name(f".{out.name}.run")


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
