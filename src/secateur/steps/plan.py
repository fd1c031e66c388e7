"""What is kept where: widths per block, decided from a survey under one target, before any weight is touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from secateur.errors import SecateurError
from secateur.steps.survey import Survey
from secateur.structure import Block, Kind, Width

TOLERANCE = 0.005
"""A plan within half a point of the wanted sparsity is on target."""


@dataclass(frozen=True)
class Plan:
    """Widths of the pruned blocks, and what they amount to."""

    widths: dict[int, Width]
    sparsity: float
    """Share of the counted parameters that goes."""
    wanted: float
    of: str
    """What the share counts: `blocks`, the pruned ones, or `model`."""
    error: float | None
    """Share of its own output that each pruned module loses, summed; None if nothing was weighed."""
    note: str | None = None
    """Said when the wanted share could not be had to within half a point."""


def plan(
    blocks: list[Block],
    *,
    sparsity: float,
    survey: Survey | None = None,
    chosen: range | None = None,
    of: str = "blocks",
    kinds: tuple[Kind, ...] = ("heads", "channels"),
    multiple: int = 1,
    model_parameters: int | None = None,
    obstacle: Callable[[Width], str | None] = lambda _: None,
) -> Plan:
    """One width for all chosen blocks: the split between heads and channels that costs least.

    Args:
        blocks: every block of the model.
        sparsity: share of parameters to remove, between 0 and 1.
        survey: error curves; needed only where there is a split to weigh (see `candidates`).
        chosen: the blocks to prune; all by default.
        of: count the share over the chosen `blocks` or over the whole `model`.
        kinds: modules that may be pruned.
        multiple: feed-forward widths are rounded to it.
        model_parameters: parameters of the whole model, for `of="model"`.
        obstacle: why the output format cannot hold a width, or None if it can.

    Raises:
        SecateurError: for a share that the modules do not hold, or that no width of the format gives.
    """
    chosen = chosen if chosen is not None else range(len(blocks))
    options = candidates(
        blocks,
        sparsity=sparsity,
        chosen=chosen,
        of=of,
        kinds=kinds,
        multiple=multiple,
        model_parameters=model_parameters,
        obstacle=obstacle,
    )
    best = options[0]
    error = None
    if survey is not None and len(options) > 1:
        errors = [_error(survey, blocks[chosen.start], option.widths[chosen.start]) for option in options]
        error = min(errors)
        best = options[errors.index(error)]
    return Plan(best.widths, best.sparsity, sparsity, of, error, best.note)


def candidates(
    blocks: list[Block],
    *,
    sparsity: float,
    chosen: range,
    of: str,
    kinds: tuple[Kind, ...],
    multiple: int,
    model_parameters: int | None,
    obstacle: Callable[[Width], str | None],
) -> list[Plan]:
    """Every split between heads and channels that meets the target, best match first; one needs no survey."""
    block = blocks[chosen.start]
    counted = model_parameters if of == "model" and model_parameters else block.parameters * len(chosen)

    def share(width: Width) -> float:
        return (block.parameters - block.kept_parameters(width)) * len(chosen) / counted

    full = block.feed_forward.units
    fewest = min(multiple, full) if "channels" in kinds else full
    plans: list[Plan] = []
    obstacles: list[str] = []
    most = 0.0
    for groups, per_group in _attention_widths(block, kinds):
        narrowest = Width(groups, per_group, fewest)
        if narrowest == block.width:
            continue
        reason = obstacle(narrowest)
        if reason is not None:
            obstacles.append(reason)
            continue
        most = max(most, share(narrowest))
        wanted = sparsity * counted / len(chosen)
        widths = [
            Width(groups, per_group, c) for c in _channel_widths(block, groups, per_group, wanted, kinds, multiple)
        ]
        # One width for each way of cutting the attention: the neighbours differ by a channel or a rounding step.
        near_by = [width for width in widths if width != block.width]
        if near_by:
            width = min(near_by, key=lambda w: abs(share(w) - sparsity))
            plans.append(Plan(dict.fromkeys(chosen, width), share(width), sparsity, of, None))
    if not most:
        raise SecateurError(_nothing(block, kinds, multiple, obstacles))
    if sparsity > most + TOLERANCE:
        raise SecateurError(
            f"a sparsity of {sparsity:.1%} of the {of} is more than the modules hold: at most {most:.1%} can go"
            + (" (only heads or only channels were asked for)" if len(kinds) == 1 else "")
            + (f"; {obstacles[0]}" if obstacles and len(kinds) > 1 else "")
        )
    plans.sort(key=lambda p: abs(p.sparsity - sparsity))
    near = [p for p in plans if abs(p.sparsity - sparsity) <= TOLERANCE]
    if near:
        return near
    closest = plans[0]
    why = "the widths that the format and the rounding allow"
    note = f"{closest.sparsity:.1%} goes in place of {sparsity:.1%}: it is the nearest among {why}"
    return [Plan(closest.widths, closest.sparsity, sparsity, of, None, note)]


def _nothing(block: Block, kinds: tuple[Kind, ...], multiple: int, obstacles: list[str]) -> str:
    """Why no width is left at all."""
    if obstacles:
        return f"the stock format cannot hold this: {obstacles[0]}"
    if "channels" in kinds and multiple >= block.feed_forward.units:
        return f"round is {multiple}, but the model has {block.feed_forward.units:,} channels; take a smaller one"
    if block.attention.locked:
        return f"heads cannot be removed exactly, as {block.attention.locked}; prune channels"
    return "one head and one channel are all that there is; nothing can go"


def _attention_widths(block: Block, kinds: tuple[Kind, ...]) -> list[tuple[int, int]]:
    """(groups, heads per group), dense first: whole groups, or equally many heads of every group."""
    attention = block.attention
    widths = [(attention.groups, attention.per_group)]
    if "heads" not in kinds or attention.locked:
        return widths
    if "groups" in attention.patterns:
        widths += [(groups, attention.per_group) for groups in range(attention.groups - 1, 0, -1)]
    if "heads" in attention.patterns:
        widths += [(attention.groups, heads) for heads in range(attention.per_group - 1, 0, -1)]
    return widths


def _channel_widths(
    block: Block, groups: int, per_group: int, remove: float, kinds: tuple[Kind, ...], multiple: int
) -> list[int]:
    """Feed-forward widths next to the one that removes exactly `remove` parameters of the block."""
    full = block.feed_forward.units
    if "channels" not in kinds:
        return [full]
    narrow = block.kept_parameters(Width(groups, per_group, 0))
    each = (block.kept_parameters(Width(groups, per_group, full)) - narrow) / full
    ideal = (block.parameters - remove - narrow) / each
    below = max(0, int(ideal // multiple) * multiple)
    return [c for c in dict.fromkeys((below, below + multiple)) if 0 < c <= full] + (
        [full] if below < full < below + multiple else []
    )


def _error(survey: Survey, block: Block, width: Width) -> float:
    """Share of its output that each surveyed module loses at one width, summed."""
    total = 0.0
    for curve in survey.curves:
        gone = _gone(block, curve.kind, curve.pattern, width)
        if gone is not None:
            total += (curve.errors[gone] - curve.errors[0]) / curve.energy
    return total


def _gone(block: Block, kind: Kind, pattern: str, width: Width) -> int | None:
    """How many of a curve's pattern units a width removes; None if it is the other pattern's business."""
    if kind == "channels":
        return block.feed_forward.units - width.channels
    if pattern == "groups":
        return block.attention.groups - width.groups or None
    return block.attention.per_group - width.per_group or None
