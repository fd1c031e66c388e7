"""Matrices of experts in memory, in their stored dtype.

They are nearly all of a block's memory and are multiplied one after the other. So each expert's matrix becomes float32
only when it is used, or stays as stored if torch converts it to a narrower dtype anyway.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class ExpertMatrices(Tensor):
    """Matrices of all experts (experts x rows x columns) in any dtype; indexing returns one expert's matrix in float32.

    Inside autocast, indexing returns the matrix in its stored dtype: converting it twice took a quarter of an expert's
    forward.
    """

    @classmethod
    def of(cls, tensor: Tensor) -> "ExpertMatrices":
        """Return an `ExpertMatrices` that shares the memory of a tensor."""
        return tensor.as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Apply an operation of torch; see PyTorch's documentation of `__torch_function__`."""
        found = super().__torch_function__(func, types, args, kwargs or {})
        if func is not Tensor.__getitem__:
            return found
        return plain_tensor(found) if torch.is_autocast_enabled("cpu") else plain_tensor(found).float()


def plain_tensor(tensor: Tensor) -> Tensor:
    """Return an ordinary tensor that shares the memory."""
    return tensor.as_subclass(Tensor)
