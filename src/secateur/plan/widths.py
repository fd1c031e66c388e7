"""Widths that a module may have: whole groups, as many heads of every group, channels in steps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from secateur.model.structure import EXPERTS_MULTIPLE, KINDS, Block, Depth2, Kind, Width

Obstacle = Callable[[Width], "str | None"]
"""Why the output format cannot hold a width, or None if it can."""

LEVELS = 256
"""Most widths that a feed-forward module is offered: finer steps gain nothing and make odd sizes."""


def usual_multiple(width: Width) -> int:
    """What channels of a dense width are rounded to where nobody says; narrow modules would lose too much choice.

    Products in bfloat16 take a third longer at odd multiples of 8, quantised GGUF types store 32 numbers at a time, and
    kernels of experts, which are narrow everywhere, take no others.
    """
    return 32 if width.channels >= (256 if width.experts else 1024) else 1


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


def possible_heads(block: Block, kinds: Sequence[Kind]) -> list[tuple[int, int]]:
    """The same, and none at all where that can be: what cannot leave one by one may still leave as a whole."""
    widths = attention_widths(block, kinds)
    return widths if block.attention.fixed else [*widths, (0, 0)]


def module_widths(
    block: Block, kind: Kind, multiple: int, obstacle: Obstacle, kinds: Sequence[Kind] = KINDS
) -> list[Width]:
    """What one module may be cut to by units of some kinds, dense first and zero last, its neighbour dense."""
    dense = block.width
    if kind == "heads":
        found = [replace(dense, groups=groups, per_group=heads) for groups, heads in possible_heads(block, (kind,))]
    else:
        found = [dense]
        if kind == "experts" and "experts" in kinds:
            found += [replace(dense, experts=count) for count in expert_counts(block.feed_forward)[1:]]
        if "channels" in kinds:
            step = channel_step(dense.channels, multiple_of(dense, multiple))
            # Experts stay, so that something of each must.
            last = 0 if kind == "experts" else -1
            counts = range((dense.channels - 1) // step * step, last, -step)
            found += [replace(dense, channels=count) for count in counts]
    return [width for width in found if width == dense or obstacle(width) is None]


def multiple_of(dense: Width, multiple: int) -> int:
    """What a block's channels are rounded to: those of experts at least as their kernels need it."""
    return math.lcm(multiple, EXPERTS_MULTIPLE) if dense.experts else multiple


def expert_counts(mixture: Depth2) -> list[int]:
    """How many experts may stay, all of them first: as many of every group, and enough for a token to meet."""
    groups = mixture.groups
    return list(range(mixture.units, max(mixture.least, groups) - 1, -groups))


def channel_step(channels: int, multiple: int) -> int:
    """The step between the widths that are offered: a power of two times the multiple, at most `LEVELS` of them."""
    return multiple * 2 ** max(0, math.ceil(math.log2(channels / multiple / LEVELS)))
