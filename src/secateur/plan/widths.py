"""Widths that a module may have: narrower along one of its axes, or gone."""

from collections.abc import Callable, Sequence

from secateur.model.axes import Axis, Width
from secateur.model.kinds import KINDS
from secateur.model.structure import Block, PrunableModule

UnsupportedReason = Callable[[Width], "str | None"]
"""Why the output format cannot hold a width, or None if it can."""


def default_multiple(axes: Sequence[Axis]) -> int:
    """Return the multiple to which rounded axes are cut where `--round` is not given.

    Products in bfloat16 take a third longer at odd multiples of 8, and quantised GGUF types store 32 numbers at a time;
    narrow modules would lose too much choice.
    """
    return 32 if all(axis.units >= axis.wide for axis in axes if axis.rounded) else 1


def module_widths(
    block: Block,
    module: PrunableModule,
    multiple: int,
    unsupported_reason: UnsupportedReason,
    kinds: Sequence[str] = KINDS,
) -> list[Width]:
    """Return the widths that one module may have, dense first and zero last, the rest of the block dense.

    Args:
        multiple: see `Axis.numbers`.
        unsupported_reason: asked for each narrower width.
        kinds: kinds of units that may leave.
    """
    dense = block.width
    axes = [axis for axis in module.axes if axis.kind in kinds]
    found = [dense | {axis.name: number} for axis in axes for number in axis.numbers(multiple)[1:]]
    if axes and not module.fixed:
        found.append(dense | module.removed)
    return [dense, *(width for width in found if unsupported_reason(width) is None)]


def head_widths(block: Block, kinds: Sequence[str] = KINDS) -> list[Width]:
    """Return the widths of a block with fewer query heads but some, dense first."""
    attention = block.attention
    return [width for width in module_widths(block, attention, 1, lambda _: None, kinds) if attention.units_at(width)]
