"""Reader of ratio files. A ratio file gives the share of units to remove for ranges of blocks."""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from secateur.base.errors import SecateurError
from secateur.model.axes import Axis, Width
from secateur.model.kinds import KINDS
from secateur.model.structure import Block, PrunableModule
from secateur.plan.plan_file import read_json_object
from secateur.plan.widths import module_widths


def read_ratios(path: Path, blocks: Sequence[Block], multiple: int) -> dict[int, Width]:
    """Read a ratio file, for example `{"4:20": 0.25, "20:30": {"heads": 0.1, "channels": 0.4}}`.

    A ratio is the share of the units to remove. A single ratio applies to the heads of the attention and to the
    channels of the feed-forward. In a mixture of experts it applies to whole experts, and the remaining experts keep
    all channels.

    Args:
        path: JSON file that maps ranges of blocks, `first:end`, to a ratio or to a ratio for each kind of units. Blocks
            outside all ranges stay dense.
        blocks: All blocks of the model.
        multiple: Value of `--round`: the multiple to which channels are rounded.

    Returns:
        The width of every block in a range: the possible width that is nearest to the ratios.

    Raises:
        SecateurError: The file cannot be parsed, ranges overlap or exceed the model, or no unit is removed.
    """
    widths: dict[int, Width] = {}
    for key, raw in read_json_object(path).items():
        match = re.fullmatch(r"(\d+):(\d+)", key)
        indices = range(int(match[1]), int(match[2])) if match else range(0)
        if not indices or indices.stop > len(blocks):
            raise SecateurError(f"{path}: '{key}' is not a range of blocks; write first:end within 0:{len(blocks)}")
        ratios = raw if isinstance(raw, dict) else {KINDS[0]: raw}
        if not all(kind in KINDS and _is_ratio(ratio) for kind, ratio in ratios.items()):
            raise SecateurError(
                f"{path}: {key}: write the share to remove, from 0 to 1, or one share each for {', '.join(KINDS)}"
            )
        for index in indices:
            if index in widths:
                raise SecateurError(f"{path}: block {index} is in two ranges; remove it from one of them")
            block = blocks[index]
            ratios = raw if isinstance(raw, dict) else dict.fromkeys(block.kinds, raw)
            widths[index] = _nearest_width(block, ratios, multiple)
    if all(width == blocks[index].width for index, width in widths.items()):
        raise SecateurError(f"{path}: no unit is removed; add a range, or increase the ratios")
    return dict(sorted(widths.items()))


def _is_ratio(raw: Any) -> bool:
    """Return whether a value in a JSON file is a number from 0 to 1."""
    return isinstance(raw, int | float) and not isinstance(raw, bool) and 0 <= raw <= 1


def _nearest_width(block: Block, ratios: Mapping[str, float], multiple: int) -> Width:
    """Return the width of a block that is nearest to the ratio of each kind of units."""
    result = block.width
    for module in block.modules:
        for kind, group in groupby(module.axes, key=lambda axis: axis.kind):
            axes = list(group)
            names = [axis.name for axis in axes]
            if ratio := ratios.get(kind, 0.0):
                units = block.width.product(names) * (1 - ratio)
                candidates = _candidates(block, module, axes, ratio, multiple)
                nearest = min(candidates, key=lambda width: abs(width.product(names) - units))
                result |= {name: nearest[name] for name in names}
    return result


def _candidates(
    block: Block, module: PrunableModule, axes: Sequence[Axis], ratio: float, multiple: int
) -> Sequence[Width]:
    """Return the widths from which a ratio selects one, the dense width first."""
    # Only a ratio of one removes the module. Rounding to a multiple larger than the module does not remove it.
    if ratio == 1 and not module.fixed:
        return [block.width | module.removed]
    if len(axes) > 1:
        return [width for width in module_widths(block, module, multiple, lambda _: None) if module.units_at(width)]
    (axis,) = axes
    dense, *narrower = axis.all_numbers(multiple)
    return [block.width | {axis.name: number} for number in (dense, *reversed(narrower))]
