"""Activations of token rows, held in memory up to a limit and in files beyond it."""

import math
import os
import tempfile
import weakref
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from secateur.base.errors import StoppedError
from secateur.base.files import is_disk_full
from secateur.base.memory import MemoryBudget
from secateur.model.rows import Batch, Rows

PIECE = 2**24
"""Bytes that are copied at once when a whole group of rows is read, written or sent."""


class FileRows:
    """Tensor in a temporary file, indexed along its first dimension.

    Values are copied into memory. The file is not memory-mapped, as mapped pages count as resident memory.
    """

    def __init__(self, folder: Path | None, shape: tuple[int, ...], dtype: torch.dtype):
        """Create the file. It has no name, so that the system deletes it however the process ends."""
        self.shape, self.dtype = shape, dtype
        self._row = math.prod(shape[1:]) * dtype.itemsize
        self._folder = folder or Path(tempfile.gettempdir())
        self._file, path = tempfile.mkstemp(dir=folder)
        self.close = weakref.finalize(self, os.close, self._file)
        """Function that closes the file and frees its space on disk."""
        os.unlink(path)
        os.ftruncate(self._file, shape[0] * self._row)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice) -> Tensor:
        """Return a copy of some rows."""
        if isinstance(rows, int):
            return self[rows : rows + 1][0]
        start, stop, _ = rows.indices(len(self))
        result = torch.empty((max(0, stop - start), *self.shape[1:]), dtype=self.dtype)
        view, place = memory_of(result), start * self._row
        while view:
            count = os.preadv(self._file, [view], place)
            view, place = view[count:], place + count
        return result

    def __setitem__(self, rows: slice, values: Tensor) -> None:
        """Write rows."""
        view, place = memory_of(values.to(self.dtype)), rows.indices(len(self))[0] * self._row
        try:
            while view:
                count = os.pwrite(self._file, view, place)
                view, place = view[count:], place + count
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise StoppedError(
                f"{self._folder}: the disk is full and cannot hold the activations; free space, or allow more "
                "--memory, and run again"
            ) from error


class Activations:
    """Vectors of all tokens of some `Rows`, in CPU memory or in files; indexed by a `Batch` (b x t x width).

    Attributes:
        parts: One tensor for each group of rows (rows x t x width).
    """

    def __init__(self, parts: list[Tensor | FileRows]):
        self.parts = parts

    def __getitem__(self, at: Batch) -> Tensor:
        return self.parts[at.group][at.rows]

    def __setitem__(self, at: Batch, values: Tensor) -> None:
        part = self.parts[at.group]
        shape = (at.rows.stop - at.rows.start, *part.shape[1:])
        part[at.rows] = values.detach().reshape(shape).cpu()


class Arena:
    """Allocator of activations: in memory up to a limit, beyond it in files that are closed on exit."""

    def __init__(self, budget: MemoryBudget | None = None, folder: Path | None = None):
        """Create an empty arena.

        Args:
            budget: Memory of which the arena takes what is left; by default a quarter of the machine's memory.
            folder: Folder of the files; by default the system's folder for temporary files.
        """
        self.budget, self.folder = budget or MemoryBudget(), folder
        self._used = 0
        self._files: weakref.WeakSet[FileRows] = weakref.WeakSet()

    def empty(self, rows: Rows, width: int, dtype: torch.dtype = torch.float32) -> Activations:
        """Return uninitialised activations for rows."""
        return Activations([self.tensor((*group.shape, width), dtype) for group in rows.groups])

    def copy(self, rows: Rows, other: Activations) -> Activations:
        """Return a copy of the activations of some rows."""
        result = self.empty(rows, other.parts[0].shape[-1], other.parts[0].dtype)
        for at in rows.batches():
            result[at] = other[at]
        return result

    def release(self, activations: Activations) -> None:
        """Free the memory or file space of activations, which must not be used afterwards."""
        for part in activations.parts:
            self.free(part)
        activations.parts = []

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | FileRows:
        """Return an uninitialised tensor, in memory or in a file."""
        size = dtype.itemsize * math.prod(shape)
        if not self.budget.take(size):
            self._files.add(file := FileRows(self.folder, shape, dtype))
            return file
        self._used += size
        return torch.empty(shape, dtype=dtype)

    def free(self, tensor: Tensor | FileRows) -> None:
        """Free the memory or file space of a result of `tensor`, which must not be used afterwards."""
        if isinstance(tensor, FileRows):
            tensor.close()
        elif self._used:
            self._give_back(tensor.nbytes)

    def _give_back(self, size: int) -> None:
        self.budget.give_back(size)
        self._used -= size

    def __enter__(self) -> "Arena":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The traceback of an error keeps the activations alive.
        for file in self._files:
            file.close()
        self._give_back(self._used)


def memory_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor in CPU memory."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
