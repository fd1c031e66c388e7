"""Matrices of all experts of a block, each read when it is used.

Together they can be larger than the memory: 22 GB in a block of DeepSeek-V3. They are used one after the other, so one
is in memory at a time, and more only if there is room for them.
"""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from secateur.base.device import to_device
from secateur.base.memory import MemoryBudget


class ExpertMatrices:
    """Matrices of all experts, from a checkpoint or computed from others.

    Attributes:
        shape: Experts, rows and columns.
        dtype: Dtype of the matrices.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[int], Tensor]):
        self.shape, self.dtype, self._read = shape, dtype, read

    def read(self, expert: int) -> Tensor:
        """Return the matrix of one expert, which the caller must not change."""
        return self._read(expert)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the matrix of each expert."""
        return map(self.read, range(self.shape[0]))

    def to(self, dtype: torch.dtype) -> "ExpertMatrices":
        """Return the matrices in a dtype."""
        return ExpertMatrices(self.shape, dtype, lambda expert: self.read(expert).to(dtype))

    def select(self, experts: Tensor) -> "ExpertMatrices":
        """Return the matrices of some experts."""
        numbers = experts.tolist()
        return ExpertMatrices((len(numbers), *self.shape[1:]), self.dtype, lambda expert: self.read(numbers[expert]))

    def transposed(self) -> "ExpertMatrices":
        """Return the transposed matrices."""
        count, rows, columns = self.shape
        return ExpertMatrices((count, columns, rows), self.dtype, lambda expert: self.read(expert).T)


BlockTensor: TypeAlias = Tensor | ExpertMatrices
"""Tensor of a block, in memory or, for the matrices of all experts, read matrix by matrix."""


class KeptMatrices(ExpertMatrices):
    """Matrices on a device, where they stay once they were read, as far as a budget allows.

    The others are read again each time, except for the last one.
    """

    def __init__(self, source: ExpertMatrices, device: torch.device, budget: MemoryBudget):
        super().__init__(source.shape, source.dtype, lambda expert: to_device(source.read(expert), device))
        self._budget = budget
        self._kept: dict[int, Tensor] = {}
        self._last: tuple[int, Tensor] | None = None

    def read(self, expert: int) -> Tensor:
        """Return the matrix of one expert."""
        if expert in self._kept:
            return self._kept[expert]
        if self._last is None or self._last[0] != expert:
            # Free the last matrix before the next one is read.
            self._last = None
            matrix = self._read(expert)
            if self._budget.take(matrix.nbytes):
                self._kept[expert] = matrix
                return matrix
            self._last = expert, matrix
        return self._last[1]

    def release(self) -> None:
        """Free the matrices; they can be read again."""
        self._budget.give_back(sum(matrix.nbytes for matrix in self._kept.values()))
        self._kept, self._last, self._budget = {}, None, MemoryBudget(0)


def matrix_by_matrix(function: Callable[..., Tensor], *tensors: BlockTensor, dtype: torch.dtype) -> BlockTensor:
    """Return a function of tensors of one shape, such as their mean; of matrices, computed when a matrix is read.

    Args:
        function: The function, entry by entry.
        tensors: Its arguments.
        dtype: Dtype of its result.
    """
    matrices = [tensor for tensor in tensors if isinstance(tensor, ExpertMatrices)]
    if not matrices:
        return function(*tensors)
    return ExpertMatrices(matrices[0].shape, dtype, lambda expert: function(*(one.read(expert) for one in matrices)))


def select_in_each(tensor: BlockTensor, axis: int, entries_ek: Tensor) -> BlockTensor:
    """Return the matrices of all experts with some entries along an axis, which differ from expert to expert.

    Args:
        tensor: The matrices, or other tensors with the expert first.
        axis: Axis of `tensor`, not the first.
        entries_ek: Entries that stay of each expert.
    """

    def selected(matrix: Tensor, expert: int) -> Tensor:
        return matrix.index_select(axis - 1, entries_ek[expert].to(matrix.device))

    if isinstance(tensor, Tensor):
        # One index for all entries would be several times the weights' size.
        return torch.stack([selected(matrix, expert) for expert, matrix in enumerate(tensor)])
    shape = (*tensor.shape[:axis], entries_ek.shape[1], *tensor.shape[axis + 1 :])
    return ExpertMatrices(shape, tensor.dtype, lambda expert: selected(tensor.read(expert), expert))


def whole(tensor: BlockTensor) -> Tensor:
    """Return a tensor in memory; of matrices, a copy on the CPU."""
    if isinstance(tensor, Tensor):
        return tensor
    result = torch.empty(tensor.shape, dtype=tensor.dtype)
    for place, matrix in zip(result, tensor, strict=True):
        place.copy_(matrix)
    return result
