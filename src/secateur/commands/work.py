"""The work of a step: operations, by what limits their speed, and the bytes that it holds."""

from collections.abc import Iterable
from typing import NamedTuple


class Work(NamedTuple):
    """Floating-point operations and bytes of a step."""

    forward: float = 0.0
    """Operations in forward passes of blocks."""
    rounded: float = 0.0
    """Operations in matrix products that may be rounded to bfloat16."""
    float32: float = 0.0
    """Operations in float32: products, factorisations and solves."""
    generated: float = 0.0
    """Operations in generating text token by token."""
    moved_bytes: float = 0.0
    """Bytes read and written, in steps whose time depends on them."""
    resident_bytes: int = 0
    """Bytes that must be in memory, in addition to Python and its libraries."""
    activation_bytes: int = 0
    """Bytes of activations, which can also be kept in files."""

    @classmethod
    def total(cls, parts: Iterable["Work"]) -> "Work":
        """Return the work of steps that run one after the other: the sum of operations, the maximum of bytes held."""
        *summed, resident, activations = zip(cls(), *parts, strict=True)
        forward, rounded, float32, generated, moved = map(sum, summed)
        return cls(forward, rounded, float32, generated, moved, max(resident), max(activations))
