"""The matrices of a block's experts, in memory as they are stored.

They are nearly all of such a block, and are multiplied by one after the other: only what is taken out is float32.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class Held(Tensor):
    """Matrices of all experts (experts x rows x columns) in any dtype; each one, by its number, comes in float32."""

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
        return plain(found).float() if func is Tensor.__getitem__ else found


def plain(tensor: Tensor) -> Tensor:
    """The same memory as an ordinary tensor."""
    return tensor.as_subclass(Tensor)
