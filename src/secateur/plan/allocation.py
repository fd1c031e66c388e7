"""Which width each block keeps under one budget: the same for all, or those that together cost least.

What a plan takes is a sum over modules (`plan/meters.py`), and so is what it costs (`survey/prices.py`); the best widths
are then a separable knapsack (`plan/knapsack.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from secateur.model.structure import Block, Kind, Width
from secateur.plan.knapsack import choose
from secateur.plan.meters import Meter
from secateur.survey.prices import Prices

Obstacle = Callable[[Width], "str | None"]
"""Why the output format cannot hold a width, or None if it can."""

LEVELS = 256
"""Most widths that a feed-forward module is offered: finer steps gain nothing and make odd sizes."""


def attention_widths(block: Block, kinds: Sequence[Kind]) -> list[tuple[int, int]]:
    """(groups, heads per group), dense first: whole groups, or equally many heads of every group; not zero."""
    attention = block.attention
    widths = [(attention.groups, attention.per_group)]
    if "heads" not in kinds or attention.locked:
        return widths
    if "groups" in attention.patterns:
        widths += [(groups, attention.per_group) for groups in range(attention.groups - 1, 0, -1)]
    if "heads" in attention.patterns:
        widths += [(attention.groups, heads) for heads in range(attention.per_group - 1, 0, -1)]
    return widths


def module_widths(block: Block, kind: Kind, multiple: int, obstacle: Obstacle) -> list[Width]:
    """What one module may be cut to, dense first and zero last, its neighbour dense."""
    dense = block.width
    if kind == "heads":
        found = [Width(groups, heads, dense.channels) for groups, heads in attention_widths(block, (kind,))]
        # A module whose units cannot leave one by one can still leave as a whole.
        found.append(Width(0, 0, dense.channels))
    else:
        step = channel_step(dense.channels, multiple)
        counts = [dense.channels, *range((dense.channels - 1) // step * step, -1, -step)]
        found = [Width(dense.groups, dense.per_group, count) for count in counts]
    return [width for width in found if width == dense or obstacle(width) is None]


def channel_step(channels: int, multiple: int) -> int:
    """The step between the widths that are offered: a power of two times the multiple, at most `LEVELS` of them."""
    return multiple * 2 ** max(0, math.ceil(math.log2(channels / multiple / LEVELS)))


def adaptive(
    blocks: Sequence[Block],
    chosen: range,
    prices: Prices,
    meter: Meter,
    budget: float,
    *,
    kinds: Sequence[Kind],
    multiple: int,
    obstacle: Obstacle,
) -> dict[int, Width] | None:
    """The widths that cost least within a budget.

    Args:
        blocks: every block of the model.
        chosen: those that may be cut.
        prices: what each width costs.
        meter: what each width takes.
        budget: the most that the model may take, in the meter's unit.
        kinds: modules that may be cut.
        multiple: feed-forward widths are multiples of it.
        obstacle: see `Obstacle`.

    Returns:
        The widths of the chosen blocks, or None if nothing is small enough.
    """
    modules = [(index, kind) for index in chosen for kind in kinds]
    options = [module_widths(blocks[index], kind, multiple, obstacle) for index, kind in modules]
    costs, sizes = [], []
    for (index, kind), widths in zip(modules, options, strict=True):
        module = blocks[index].module(kind)
        costs.append(np.array([prices.of(index, module, width) for width in widths]))
        sizes.append(np.array([float(meter.module(index, kind, width)) for width in widths]))
    result = {index: blocks[index].width for index in chosen}
    elsewhere = meter.total(result) - sum(float(size[0]) for size in sizes)
    best = choose(costs, sizes, budget - elsewhere)
    if best is None:
        return None
    for (index, kind), widths, option in zip(modules, options, best.options, strict=True):
        result[index] = merge(result[index], kind, widths[option])
    return result


def narrowest(
    blocks: Sequence[Block],
    chosen: range,
    meter: Meter,
    *,
    kinds: Sequence[Kind],
    multiple: int,
    obstacle: Obstacle,
) -> float:
    """The least that the model can take where each module has its own width; see `adaptive`."""
    total = meter.total({index: blocks[index].width for index in chosen})
    for index in chosen:
        for kind in kinds:
            sizes = [meter.module(index, kind, w) for w in module_widths(blocks[index], kind, multiple, obstacle)]
            total += min(sizes) - sizes[0]
    return total


def merge(width: Width, kind: Kind, other: Width) -> Width:
    """A width with one module's part taken from another one."""
    if kind == "heads":
        return Width(other.groups, other.per_group, width.channels)
    return Width(width.groups, width.per_group, other.channels)


def uniform(
    blocks: Sequence[Block],
    chosen: range,
    meter: Meter,
    budget: float,
    *,
    kinds: Sequence[Kind],
    multiple: int,
    obstacle: Obstacle,
    over: bool,
) -> tuple[list[tuple[Width, float]], float, list[str]]:
    """One width for all chosen blocks: for each way of cutting the attention, the feed-forward that fills the budget.

    Args:
        over: take the nearest width, even if it exceeds the budget by less than the next one falls short of it.
        others: see `adaptive`.

    Returns:
        Widths with what the model takes at them; the least that it can take; and why some cuts were left out.
    """
    block = blocks[chosen.start]
    full = block.feed_forward.units
    steps = sorted({full, *range(min(multiple, full), full, multiple)}) if "channels" in kinds else [full]
    found: list[tuple[Width, float]] = []
    reasons: list[str] = []
    least = meter.dense

    def taken(groups: int, heads: int, at: int) -> float:
        return meter.total(dict.fromkeys(chosen, Width(groups, heads, steps[at])))

    for groups, heads in attention_widths(block, kinds):
        narrowest = Width(groups, heads, steps[0])
        if narrowest == block.width:
            continue
        reason = obstacle(narrowest)
        if reason is not None:
            reasons.append(reason)
            continue
        least = min(least, taken(groups, heads, 0))
        low, high = -1, len(steps) - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if taken(groups, heads, middle) <= budget else (low, middle - 1)
        near = [at for at in ((low, low + 1) if over else (low,)) if 0 <= at < len(steps)]
        tried = [(Width(groups, heads, steps[at]), taken(groups, heads, at)) for at in near]
        tried = [(width, size) for width, size in tried if width != block.width]
        if tried:
            found.append(min(tried, key=lambda one: abs(one[1] - budget)))
    return found, least, reasons
