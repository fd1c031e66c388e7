"""Activations of all processes in one file, in the order of the rows, so that any number of processes can read them."""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from secateur.base.json_files import damaged_state
from secateur.base.processes import Processes
from secateur.model.arena import PIECE, Activations, FileRows, memory_of
from secateur.model.weights import read_into


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
