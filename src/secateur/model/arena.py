"""Activations of token rows, held in memory up to a limit and in files beyond it."""

import math
import os
import tempfile
import weakref
from pathlib import Path
from types import TracebackType

import psutil
import torch
from torch import Tensor

from secateur.base.errors import StoppedError
from secateur.base.files import is_disk_full
from secateur.model.rows import Batch, Rows

PIECE = 2**24
"""Bytes that are read, written or sent at once where a whole group of rows goes through memory."""


class FileRows:
    """A tensor in a file, reached by its first axis.

    Read into memory of its own and never mapped: pages of a mapped file count as resident.
    """

    def __init__(self, folder: Path | None, shape: tuple[int, ...], dtype: torch.dtype):
        """Make the file, without a name: it is gone with the process, whatever ends that."""
        self.shape, self.dtype = shape, dtype
        self._row = math.prod(shape[1:]) * dtype.itemsize
        self._folder = folder or Path(tempfile.gettempdir())
        self._file, path = tempfile.mkstemp(dir=folder)
        self.close = weakref.finalize(self, os.close, self._file)
        """Gives the room back."""
        os.unlink(path)
        os.ftruncate(self._file, shape[0] * self._row)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice) -> Tensor:
        """Some rows, copied."""
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
        """Write some rows."""
        view, place = memory_of(values.to(self.dtype)), rows.indices(len(self))[0] * self._row
        try:
            while view:
                count = os.pwrite(self._file, view, place)
                view, place = view[count:], place + count
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise StoppedError(
                f"{self._folder}: the disk is full, and activations have no room; make room, or allow more --memory, "
                "and run again"
            ) from error


class Activations:
    """One vector for each token of some `Rows`, on the host; read and written by the batch (b x t x width).

    `parts` has a tensor for each group of rows (rows x t x width), or what reads and writes one in a file.
    """

    def __init__(self, parts: list[Tensor | FileRows]):
        self.parts = parts

    def __getitem__(self, at: Batch) -> Tensor:
        return self.parts[at.group][at.rows]

    def __setitem__(self, at: Batch, values: Tensor) -> None:
        part = self.parts[at.group]
        shape = (at.rows.stop - at.rows.start, *part.shape[1:])
        part[at.rows] = values.detach().reshape(shape).cpu()

    def energy(self, rows: Rows, scale: Tensor | None = None) -> float:
        """Sum of the squared norms, each token counted by its weight, and each entry by a scale (width)."""
        factor = 1.0 if scale is None else scale.cpu()
        norms = ((at.weight, torch.linalg.vector_norm(self[at] * factor)) for at in rows.batches())
        return sum(weight * float(norm) ** 2 for weight, norm in norms)


class Arena:
    """Room for activations: in memory up to a limit, in files beyond it, which are closed on leaving."""

    def __init__(self, limit: int | None = None, folder: Path | None = None):
        """Start empty.

        Args:
            limit: bytes in memory, by default a quarter of the machine's.
            folder: for the files; by default the system's for temporary ones.
        """
        self.limit = psutil.virtual_memory().total // 4 if limit is None else limit
        self.folder = folder
        self.used = 0
        self._files: weakref.WeakSet[FileRows] = weakref.WeakSet()

    def empty(self, rows: Rows, width: int, dtype: torch.dtype = torch.float32) -> Activations:
        """Uninitialised activations of some rows."""
        return Activations([self._empty((*group.shape, width), dtype) for group in rows.groups])

    def copy(self, rows: Rows, other: Activations) -> Activations:
        """What others hold of some rows, once more."""
        result = self.empty(rows, other.parts[0].shape[-1], other.parts[0].dtype)
        for at in rows.batches():
            result[at] = other[at]
        return result

    def release(self, activations: Activations) -> None:
        """Give their room back; they must not be used any more."""
        for part in activations.parts:
            if isinstance(part, FileRows):
                part.close()
            else:
                self.used -= part.numel() * part.element_size()
        activations.parts = []

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | FileRows:
        size = dtype.itemsize * math.prod(shape)
        if self.used + size > self.limit:
            self._files.add(file := FileRows(self.folder, shape, dtype))
            return file
        self.used += size
        return torch.empty(shape, dtype=dtype)

    def __enter__(self) -> "Arena":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An error holds on to what it went through.
        for file in self._files:
            file.close()


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the host, in order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
