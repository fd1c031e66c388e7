"""Widths that a plan may choose for a module: narrower along one axis, or zero along all axes."""

from collections.abc import Callable, Sequence

from secateur.model.axes import Axis, Width
from secateur.model.kinds import KINDS
from secateur.model.structure import Block, PrunableModule

UnsupportedReason = Callable[[Width], "str | None"]
"""Function that returns why the output format cannot hold a width, or None if the format can."""


def default_multiple(axes: Sequence[Axis], stored: int = 1) -> int:
    """Return the default of `--round`: the multiple to which rounded axes are cut.

    The multiple is `stored`, the number of weights that the output format stores together, if this is more than 32 and
    every rounded axis has a multiple of it, at least four times. Otherwise it is 32 if all rounded axes are wide, else
    1. Matrix products in bfloat16 take a third longer at odd multiples of 8, and quantised GGUF types store 32 numbers
    at a time. Narrow modules would have too few widths left to choose from.
    """
    rounded = [axis for axis in axes if axis.rounded]
    if stored > 32 and all(axis.units % stored == 0 and axis.units >= 4 * stored for axis in rounded):
        return stored
    return 32 if all(axis.units >= axis.rounds_from for axis in rounded) else 1


def module_widths(
    block: Block,
    module: PrunableModule,
    multiple: int,
    unsupported_reason: UnsupportedReason,
    kinds: Sequence[str] = KINDS,
) -> list[Width]:
    """Return the widths that a plan may choose for one module, while the other modules of the block stay dense.

    Args:
        block: The module's block.
        module: The module.
        multiple: Value of `--round`; see `Axis.numbers`.
        unsupported_reason: Function that is called for each width narrower than the dense one.
        kinds: Kinds of units that may be removed.

    Returns:
        Widths of the block: the dense one first, then those that are narrower along one axis. The last width has no
        units of the module, where the module as a whole can be removed.
    """
    dense = block.width
    axes = [axis for axis in module.axes if axis.kind in kinds]
    narrower = [dense | {axis.name: number} for axis in axes for number in axis.numbers(multiple)[1:]]
    if axes and not module.fixed:
        narrower.append(dense | module.removed)
    return [dense, *(width for width in narrower if unsupported_reason(width) is None)]


def head_widths(block: Block, kinds: Sequence[str] = KINDS) -> list[Width]:
    """Return the dense width of a block, then, if it has query heads, the widths with fewer heads, but at least one."""
    if (module := block.find("heads")) is None:
        return [block.width]
    return [width for width in module_widths(block, module, 1, lambda _: None, kinds) if module.units_at(width)]
