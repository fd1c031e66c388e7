"""Checkpoint of a pass through the blocks: files with the state after a block, from which a stopped run resumes."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from secateur.base.json_files import read_hashed, write_hashed
from secateur.base.run_folder import saving_state
from secateur.base.services import Services
from secateur.model.activation_file import read_activations, write_activations
from secateur.model.arena import Activations

SPENT = 0.03
"""Largest share of the time that saving may take. If blocks are fast, the state is not saved after every block."""
STATE = "state.json"


class PassCheckpoint:
    """Last saved state of a pass through the blocks. Without a run folder or a name, nothing is saved.

    Attributes:
        done: Number of blocks that the pass has finished.
    """

    def __init__(self, services: Services, name: str | None = None):
        """Read the saved state, if there is one.

        Args:
            services: Services of this run. The run that saved the state may have had more or fewer processes.
            name: Name of the checkpoint in the run folder.

        Raises:
            SecateurError: The state is damaged.
        """
        self.folder = services.run_folder.folder(name) if services.run_folder and name else None
        self._services = services
        self._savers: dict[str, Callable[[], Any]] = {}
        self._since, self._cost = perf_counter(), 0.0
        state = self._services.processes.broadcast(self._read)
        self.done: int = state["done"]
        self._values: dict[str, Any] = state["values"]
        self._hash: str = state["activations"]

    def value(self, name: str, save: Callable[[], Any], default: Any = None) -> Any:
        """Return a value of the saved state, and save the result of `save` with each later state.

        Args:
            name: Name of the value.
            save: Function that returns the value in JSON types. Files that belong to the value must be on disk when it
                returns.
            default: Value to return if there is no saved state.
        """
        self._savers[name] = save
        return self._values.get(name, default)

    def blocks(self, stop: int, what: str, streams: Callable[[], Sequence[Activations]]) -> Iterator[int]:
        """Yield the remaining blocks, up to `stop`. The state after a block is saved when the next block is requested.

        Args:
            stop: Number of blocks of the whole pass.
            what: Name of the pass, for the progress bar.
            streams: Function that returns the activations to save; when a run resumes, they are filled from the saved
                state.

        Raises:
            SecateurError: The saved state is damaged.
            StoppedError: The disk is full.
        """
        if self.done:
            file = None if self.folder is None else _file(self.folder, self.done)
            read_activations(file, streams(), self._services.processes, self._hash)
        for index in self._services.watcher.track(range(self.done, stop), what, self.done):
            yield index
            self._save(index + 1, streams())

    def _save(self, done: int, streams: Sequence[Activations]) -> None:
        """Save the state after some number of blocks, unless saving would take too much of the time."""
        start, processes = perf_counter(), self._services.processes
        if not processes.broadcast(lambda: self.folder is not None and start - self._since >= self._cost / SPENT):
            return
        if self.folder is None:
            write_activations(None, streams, processes)
            return
        self._write(self.folder, done, streams)
        self.done, self._since = done, perf_counter()
        self._cost = self._since - start

    def _write(self, folder: Path, done: int, streams: Sequence[Activations]) -> None:
        """Write a state. It replaces the previous state once it is complete on disk."""
        file = _file(folder, done)
        with saving_state(folder, file):
            folder.mkdir(exist_ok=True)
            values = {name: save() for name, save in self._savers.items()}
            hashed = write_activations(file, streams, self._services.processes)
            write_hashed(folder / STATE, {"done": done, "values": values, "activations": hashed})
            _file(folder, self.done).unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        if self.folder is not None and (self.folder / STATE).exists():
            return read_hashed(self.folder / STATE)
        return {"done": 0, "values": {}, "activations": ""}


def _file(folder: Path, done: int) -> Path:
    return folder / f"behind-{done:05}.activations"
