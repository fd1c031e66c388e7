"""How far a pass through the blocks has come: what it knows behind a block, in files, to go on from after any end."""

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

from secateur.base.errors import StoppedError
from secateur.base.files import damaged, is_disk_full, read_hashed, write_hashed
from secateur.base.team import Team
from secateur.model.arena import PIECE, Activations, FileRows, memory_of
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

    def __init__(self, folder: Path | None = None, team: Team | None = None):
        """Read the state that is in a folder.

        Args:
            folder: for the state; of several processes, the first one's counts.
            team: the processes that go through the blocks together. Their number may differ from that of the run that
                kept the state, in which rows stand in order.

        Raises:
            SecateurError: it is damaged.
        """
        self.folder, self.team = folder, team or Team()
        self.beside: dict[str, Callable[[], Any]] = {}
        self._since, self._cost = perf_counter(), 0.0
        state = self.team.told(self._read)
        self.done: int = state["done"]
        self.found: dict[str, Any] = state["found"]
        self._hash: str = state["activations"]

    def _read(self) -> dict[str, Any]:
        if self.folder is not None and (self.folder / STATE).exists():
            return read_hashed(self.folder / STATE)
        return {"done": 0, "found": {}, "activations": ""}

    def restore(self, streams: Sequence[Activations]) -> None:
        """Fill activations as they were kept; they stay as they are where nothing was.

        Raises:
            SecateurError: their file is damaged.
        """
        if not self.done:
            return
        read, team = hashlib.sha256(), self.team
        try:
            with nullcontext() if self.folder is None else self._file(self.done).open("rb", buffering=0) as stored:
                for part, rank, rows in _pieces(streams, team):
                    piece = torch.empty((rows.stop - rows.start, *part.shape[1:]), dtype=part.dtype)
                    if stored is not None:
                        if not read_into(stored, memory_of(piece)):
                            raise EOFError
                        read.update(memory_of(piece))
                    team.passed(piece, 0, rank)
                    if rank == team.rank:
                        part[rows] = piece
                whole = stored is None or (not stored.read(1) and read.hexdigest() == self._hash)
        except (OSError, EOFError):
            whole = False
        if not whole:
            raise damaged(self._file(self.done))

    def keep(self, done: int, streams: Sequence[Activations], **found: Any) -> None:
        """Keep what is known behind so many blocks, unless keeping would take too much of the time.

        A state replaces the one before it once it is whole on disk.

        Raises:
            StoppedError: the disk is full.
        """
        start = perf_counter()
        if not self.team.told(lambda: self.folder is not None and start - self._since >= self._cost / SPENT):
            return
        if self.folder is None:
            for _ in self._all(streams):
                pass
            return
        file, before = self._file(done), self._file(self.done)
        try:
            self.folder.mkdir(exist_ok=True)
            found |= {name: give() for name, give in self.beside.items()}
            written = hashlib.sha256()
            with file.open("wb") as stored:
                for piece in self._all(streams):
                    written.update(memory_of(piece))
                    stored.write(memory_of(piece))
                stored.flush()
                os.fsync(stored.fileno())
            state = {"done": done, "found": found, "activations": written.hexdigest()}
            write_hashed(self.folder / STATE, state)
            before.unlink(missing_ok=True)
        except (OSError, StoppedError) as error:
            file.unlink(missing_ok=True)
            if isinstance(error, StoppedError):
                raise
            why = "the disk is full; make room" if is_disk_full(error) else f"cannot be written ({error}); mend that"
            raise StoppedError(f"{self.folder}: {why} and run again, it goes on where it was") from error
        self.done = done
        self._since = perf_counter()
        self._cost = self._since - start

    def _all(self, streams: Sequence[Activations]) -> Iterator[Tensor]:
        """The activations of all processes, where this is the first; others send theirs."""
        for part, rank, rows in _pieces(streams, self.team):
            if rank == self.team.rank:
                yield self.team.passed(part[rows].contiguous(), rank, 0)
            elif self.team.leads:
                empty = torch.empty((rows.stop - rows.start, *part.shape[1:]), dtype=part.dtype)
                yield self.team.passed(empty, rank, 0)

    def _file(self, done: int) -> Path:
        assert self.folder is not None
        return self.folder / f"behind-{done:05}.activations"


def _pieces(streams: Sequence[Activations], team: Team) -> Iterator[tuple[Tensor | FileRows, int, slice]]:
    """All rows of all processes in order, in pieces that fit into memory: a part, whose rows they are, and which."""
    for stream in streams:
        for part in stream.parts:
            size = math.prod(part.shape[1:]) * part.dtype.itemsize
            step = max(1, PIECE // max(1, size))
            for rank, count in enumerate(team.each(len(part))):
                for start in range(0, count, step):
                    yield part, rank, slice(start, min(start + step, count))
