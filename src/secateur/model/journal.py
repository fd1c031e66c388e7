"""How far a pass through the blocks has come: what it knows behind a block, in files, to go on from after any end."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from secateur.base.errors import StoppedError
from secateur.base.files import damaged, is_disk_full, read_hashed, write_hashed
from secateur.model.arena import Activations, memory_of
from secateur.model.weights import read_into

SPENT = 0.03
"""Share of the time that may go into keeping: where a block takes less than it costs to keep, some are not kept."""
STATE = "state.json"


class Journal:
    """The last state of a pass that was kept; without a folder, none is.

    Attributes:
        done: blocks that lie behind.
        found: what was kept beside the activations, by name.
        beside: functions that give more to keep, by name; whatever it refers to is on disk once they return.
    """

    def __init__(self, folder: Path | None = None):
        """Read the state that is in a folder.

        Raises:
            SecateurError: it is damaged.
        """
        self.folder, self.done = folder, 0
        self.found: dict[str, Any] = {}
        self.beside: dict[str, Callable[[], Any]] = {}
        self._since, self._cost = perf_counter(), 0.0
        self._hash = ""
        if folder is not None and (folder / STATE).exists():
            state = read_hashed(folder / STATE)
            self.done, self.found, self._hash = state["done"], state["found"], state["activations"]

    def restore(self, streams: Sequence[Activations]) -> None:
        """Fill activations as they were kept; they stay as they are where nothing was.

        Raises:
            SecateurError: their file is damaged.
        """
        if self.folder is None or not self.done:
            return
        file, read = self._file(self.done), hashlib.sha256()
        try:
            with file.open("rb", buffering=0) as stored:
                for stream in streams:
                    for part, rows in stream.pieces():
                        piece = torch.empty((rows.stop - rows.start, *part.shape[1:]), dtype=part.dtype)
                        if not read_into(stored, memory_of(piece)):
                            raise EOFError
                        read.update(memory_of(piece))
                        part[rows] = piece
                whole = not stored.read(1) and read.hexdigest() == self._hash
        except (OSError, EOFError):
            whole = False
        if not whole:
            raise damaged(file)

    def keep(self, done: int, streams: Sequence[Activations], **found: Any) -> None:
        """Keep what is known behind so many blocks, unless keeping would take too much of the time.

        A state replaces the one before it once it is whole on disk.

        Raises:
            StoppedError: the disk is full.
        """
        start = perf_counter()
        if self.folder is None or start - self._since < self._cost / SPENT:
            return
        file, before = self._file(done), self._file(self.done)
        try:
            self.folder.mkdir(exist_ok=True)
            found |= {name: give() for name, give in self.beside.items()}
            written = hashlib.sha256()
            with file.open("wb") as stored:
                for stream in streams:
                    for part, rows in stream.pieces():
                        view = memory_of(part[rows])
                        written.update(view)
                        stored.write(view)
                stored.flush()
                os.fsync(stored.fileno())
            state = {"done": done, "found": found, "activations": written.hexdigest()}
            write_hashed(self.folder / STATE, state)
            before.unlink(missing_ok=True)
        except (OSError, StoppedError) as error:
            file.unlink(missing_ok=True)
            full = is_disk_full(error) or isinstance(error, StoppedError)
            why = "the disk is full; make room" if full else f"cannot be written ({error}); mend that"
            raise StoppedError(f"{self.folder}: {why} and run again, it goes on where it was") from error
        self.done = done
        self._since = perf_counter()
        self._cost = self._since - start

    def _file(self, done: int) -> Path:
        assert self.folder is not None
        return self.folder / f"behind-{done:05}.activations"
