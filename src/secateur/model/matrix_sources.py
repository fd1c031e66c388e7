"""Matrices of all experts of a block, from a checkpoint or from a fit, each read when it is used.

Together they can be larger than the memory: 22 GB in a block of DeepSeek-V3. They are used one after the other, so one
is in memory at a time, and more only if there is room for them.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.base.memory import MemoryBudget
from secateur.model.arena import Arena
from secateur.model.weights import TensorInfo, read_ahead


class MatrixSource(ABC):
    """Matrices of all experts.

    Attributes:
        shape: Experts, rows and columns.
        dtype: Dtype of the matrices.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def read(self, expert: int) -> Tensor:
        """Return the matrix of one expert in CPU memory, which the caller must not change."""


@dataclass(frozen=True)
class StackedMatrices(MatrixSource):
    """Matrices that a checkpoint stores in one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: TensorInfo

    def read(self, expert: int) -> Tensor:
        """Return the matrix of one expert."""
        return self.stored.read_entry(expert)


@dataclass(frozen=True)
class SeparateMatrices(MatrixSource):
    """Matrices that a checkpoint stores expert by expert, each in one or several tensors of consecutive rows."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: Sequence[Sequence[TensorInfo]]
    """Tensors of each expert."""

    def read(self, expert: int) -> Tensor:
        """Return the matrix of one expert, while the system reads the next expert's from disk."""
        read_ahead(part for info in self.stored[(expert + 1) % len(self.stored)] for part in info.parts)
        tensors = [info.read() for info in self.stored[expert]]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


class KeptMatrices(MatrixSource):
    """Matrices of another source that stay in memory once they were read, as far as a budget allows.

    The others are read again each time, except for the last one.
    """

    def __init__(self, source: MatrixSource, budget: MemoryBudget):
        self.shape, self.dtype = source.shape, source.dtype
        self._source, self._budget = source, budget
        self._kept: dict[int, Tensor] = {}
        self._last: tuple[int, Tensor] | None = None

    def read(self, expert: int) -> Tensor:
        """Return the matrix of one expert."""
        if expert in self._kept:
            return self._kept[expert]
        if self._last is None or self._last[0] != expert:
            # Free the last matrix before the next one is read.
            self._last = None
            matrix = self._source.read(expert)
            if self._budget.take(matrix.nbytes):
                self._kept[expert] = matrix
                return matrix
            self._last = expert, matrix
        return self._last[1]

    def release(self) -> None:
        """Free the matrices; they can be read again."""
        self._budget.give_back(sum(matrix.nbytes for matrix in self._kept.values()))
        self._kept, self._last, self._budget = {}, None, MemoryBudget(0)


class ChangedMatrices(MatrixSource):
    """Matrices of another source, some of which have new values, in memory or in a file."""

    def __init__(self, old: MatrixSource, dtype: torch.dtype, arena: Arena):
        """Start with the old values.

        Args:
            old: The old matrices.
            dtype: Dtype of the new values, to which old values are rounded.
            arena: Allocator of the memory or the file of the new values.
        """
        self.shape, self.dtype = old.shape, dtype
        self._old, self._changed = old, set[int]()
        self._values = arena.tensor(self.shape, dtype)
        weakref.finalize(self, arena.free, self._values)

    def read(self, expert: int) -> Tensor:
        """Return the matrix of one expert."""
        return self._values[expert] if expert in self._changed else self._old.read(expert).to(self.dtype)

    def write(self, expert: int, matrix: Tensor) -> None:
        """Set the matrix of one expert."""
        self._values[expert : expert + 1] = matrix[None].to(self.dtype)
        self._changed.add(expert)


@dataclass(frozen=True)
class ComputedMatrices(MatrixSource):
    """Matrices that a function computes when they are read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: Callable[[int], Tensor]
    """Function from the number of an expert to its matrix."""

    def read(self, expert: int) -> Tensor:
        """Return the matrix of one expert."""
        return self.compute(expert)
