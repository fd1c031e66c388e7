"""Activations of token rows, held in memory up to a limit and in files beyond it."""

import math
import os
import tempfile

import torch
from torch import Tensor

from secateur.model.rows import Batch, Rows


class Activations:
    """One vector for each token of some `Rows`, on the host; read and written by the batch (b x t x width)."""

    def __init__(self, parts: list[Tensor]):
        self.parts = parts

    def __getitem__(self, at: Batch) -> Tensor:
        return self.parts[at.group][at.rows]

    def __setitem__(self, at: Batch, values: Tensor) -> None:
        part = self.parts[at.group][at.rows]
        part.copy_(values.reshape(part.shape))

    def energy(self, rows: Rows, scale: Tensor | None = None) -> float:
        """Sum of the squared norms, each token counted by its weight, and each entry by a scale (width)."""
        factor = 1.0 if scale is None else scale.cpu()
        norms = ((at.weight, torch.linalg.vector_norm(self[at] * factor)) for at in rows.batches())
        return sum(weight * float(norm) ** 2 for weight, norm in norms)


class Arena:
    """Room for activations: in memory up to a limit, in temporary files beyond it."""

    def __init__(self, limit: int | None = None):
        """Start empty; the default limit in bytes is a quarter of the machine's memory."""
        quarter = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
        self.limit = quarter if limit is None else limit
        self.used = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0

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
            file = part.untyped_storage().filename
            if file:
                os.unlink(file)
            else:
                self.used -= part.numel() * part.element_size()
        activations.parts = []

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        if self.used + dtype.itemsize * count <= self.limit:
            self.used += dtype.itemsize * count
            return torch.empty(shape, dtype=dtype)
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="secateur-")
        self._files += 1
        path = os.path.join(self._folder.name, str(self._files))
        return torch.from_file(path, shared=True, size=count, dtype=dtype).view(shape)

    def __enter__(self) -> "Arena":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()
