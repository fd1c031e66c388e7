"""Checkpoint of a pass through the blocks: files with the state after a block, from which a stopped run resumes.

Activations are written to a file of their own, one piece after the other.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from secateur.base.json_files import damaged_state, read_hashed, write_hashed
from secateur.base.processes import Processes
from secateur.base.run_folder import saving_state
from secateur.base.services import Services
from secateur.checkpoints.weights import read_into
from secateur.model.arena import PIECE, Activations, FileRows, memory_of


def write_activations(file: Path | None, streams: Sequence[Activations], processes: Processes) -> str:
    """Write the activations of all processes to a file of rank 0, and return its hash; other ranks pass None."""
    written = hashlib.sha256()
    with nullcontext() if file is None else file.open("wb") as stored:
        for part, rank, rows in _pieces(streams, processes):
            piece = part[rows].contiguous() if rank == processes.rank else _empty(part, rows)
            processes.send(piece, rank, 0)
            if stored is not None:
                written.update(memory_of(piece))
                stored.write(memory_of(piece))
        if stored is not None:
            stored.flush()
            os.fsync(stored.fileno())
    return written.hexdigest()


def read_activations(file: Path | None, streams: Sequence[Activations], processes: Processes, wanted: str) -> None:
    """Fill activations of all processes from a file of rank 0; other ranks pass None.

    Raises:
        SecateurError: The file is missing or damaged: its hash is not `wanted`.
    """
    read = hashlib.sha256()
    try:
        with nullcontext() if file is None else file.open("rb", buffering=0) as stored:
            for part, rank, rows in _pieces(streams, processes):
                piece = _empty(part, rows)
                if stored is not None:
                    if not read_into(stored, memory_of(piece)):
                        raise EOFError
                    read.update(memory_of(piece))
                processes.send(piece, 0, rank)
                if rank == processes.rank:
                    part[rows] = piece
            whole = stored is None or (not stored.read(1) and read.hexdigest() == wanted)
    except (OSError, EOFError):
        whole = False
    if file is not None and not whole:
        raise damaged_state(file)


def _pieces(streams: Sequence[Activations], processes: Processes) -> Iterator[tuple[Tensor | FileRows, int, slice]]:
    """Yield all rows of all processes in order, in pieces that fit into memory: (tensor, rank, rows of that rank)."""
    for stream in streams:
        for part in stream.parts:
            size = math.prod(part.shape[1:]) * part.dtype.itemsize
            step = max(1, PIECE // max(1, size))
            for rank, count in enumerate(processes.all_gather(len(part))):
                for start in range(0, count, step):
                    yield part, rank, slice(start, min(start + step, count))


def _empty(part: Tensor | FileRows, rows: slice) -> Tensor:
    return torch.empty((rows.stop - rows.start, *part.shape[1:]), dtype=part.dtype)


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
        file = _file(self.folder, done)
        with saving_state(self.folder, file):
            self.folder.mkdir(exist_ok=True)
            values = {name: save() for name, save in self._savers.items()}
            hashed = write_activations(file, streams, processes)
            # The state replaces the previous one once it is complete on disk.
            write_hashed(self.folder / STATE, {"done": done, "values": values, "activations": hashed})
            _file(self.folder, self.done).unlink(missing_ok=True)
        self.done, self._since = done, perf_counter()
        self._cost = self._since - start

    def _read(self) -> dict[str, Any]:
        if self.folder is not None and (self.folder / STATE).exists():
            return read_hashed(self.folder / STATE)
        return {"done": 0, "values": {}, "activations": ""}


def _file(folder: Path, done: int) -> Path:
    return folder / f"behind-{done:05}.activations"
