"""Tensors whose shapes are known at once and whose values are computed when they are written, so that only one tensor
is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LazyTensor:
    """Tensor of a known shape whose values are computed on demand."""

    shape: tuple[int, ...]
    compute: Callable[[], Tensor]

    @staticmethod
    def of(tensor: Tensor) -> LazyTensor:
        """Return a lazy tensor of values that are in memory."""
        return LazyTensor(tuple(tensor.shape), lambda: tensor)

    @staticmethod
    def full(shape: tuple[int, ...], value: float) -> LazyTensor:
        """Return a tensor with one value everywhere."""
        return LazyTensor(shape, lambda: torch.full(shape, value))

    @staticmethod
    def concatenated(parts: Sequence[LazyTensor]) -> LazyTensor:
        """Return the rows of several tensors, one tensor after the other."""
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        return LazyTensor(shape, lambda: torch.cat([part.compute() for part in parts]))

    def then(self, change: Callable[[Tensor], Tensor]) -> LazyTensor:
        """Return the tensor after a change. The new shape is found by applying the change to a tensor without data."""
        shape = change(torch.empty(self.shape, device="meta")).shape
        return LazyTensor(tuple(shape), lambda: change(self.compute()))
