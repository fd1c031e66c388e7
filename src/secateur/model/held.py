"""The matrices of a block's experts, in memory as they are stored.

They are nearly all of such a block, and are multiplied by one after the other: only what is taken out is float32, or
left as it is where torch casts it to a narrower type anyway.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Held(Tensor):
    """Matrices of all experts (experts x rows x columns) in any dtype; each one, by its number, comes in float32.

    Inside autocast it comes as it is stored: to cast it twice took a quarter of an expert's forward pass.
    """

    @classmethod
    def of(cls, tensor: Tensor) -> "Held":
        """The same memory, held so."""
        return tensor.as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Whatever is done with it, as torch asks; see there."""
        found = super().__torch_function__(func, types, args, kwargs or {})
        if func is not Tensor.__getitem__:
            return found
        return plain(found) if torch.is_autocast_enabled("cpu") else plain(found).float()


def plain(tensor: Tensor) -> Tensor:
    """The same memory as an ordinary tensor."""
    return tensor.as_subclass(Tensor)
