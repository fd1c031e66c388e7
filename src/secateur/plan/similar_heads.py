"""From distances between heads to those that go: the threshold, and what a block can do without and still be loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.criteria.similarity import candidates
from secateur.model.structure import Block, Depth2, Keep, Width
from secateur.plan.allocation import attention_widths
from secateur.plan.plan import TOLERANCE, Plan, Wish
from secateur.plan.target import FASTER, Target


@dataclass(frozen=True)
class Similar:
    """What was found in the chosen blocks."""

    tau: float
    """Two heads closer than it are similar."""
    range: tuple[float, float]
    """The least and the largest distance between two heads of a block."""
    candidates: dict[int, tuple[int, ...]]
    """Heads of each block that resemble another one."""
    removed: dict[int, tuple[int, ...]] | None = None
    """The heads that go, where similarity alone decides: as many candidates as leave whole groups, or equal ones."""
    share: float | None = None
    """Of the chosen blocks' attention parameters, what goes with them."""

    def as_dict(self) -> dict[str, Any]:
        """For the record of a run."""
        record: dict[str, Any] = {"tau": self.tau, "distances": list(self.range), "attention_share": self.share}
        blocks = []
        for index, heads in self.candidates.items():
            removed = {} if self.removed is None else {"removed": list(self.removed[index])}
            blocks.append({"block": index, "candidates": list(heads), **removed})
        return record | {"blocks": blocks}

    def said(self) -> str:
        """One clause for people."""
        found = sum(map(len, self.candidates.values()))
        what = f"tau {self.tau:.4g} finds {found} similar heads (distances {self.range[0]:.3g} to {self.range[1]:.3g})"
        if self.removed is None:
            return f"{what}; in each module they go first"
        gone = sum(map(len, self.removed.values()))
        which = "all" if gone == found else f"{gone} in whole key/value groups, or as many of every group,"
        return f"{what}; {which} go, {self.share:.1%} of the attention's parameters"


def check_heads(wish: Wish) -> None:
    """See that some head can go, before anything is measured.

    Raises:
        SecateurError: the model or the output format holds no fewer heads.
    """
    reasons = []
    for index in wish.chosen:
        block = wish.blocks[index]
        if block.attention.locked:
            raise SecateurError(f"heads cannot be removed exactly, as {block.attention.locked}; take another criterion")
        obstacles = [wish.obstacle(width) for width in _narrower(block)]
        if None in obstacles:
            return
        reasons += [reason for reason in obstacles if reason is not None]
    if reasons:
        raise SecateurError(f"the format cannot hold fewer heads: {reasons[0]}")
    raise SecateurError("the blocks have one head each; similarity has nothing to compare: take another criterion")


def find(distances: Mapping[int, Tensor], tau: float) -> Similar:
    """The similar heads of every block.

    Args:
        distances: of each block's heads (h x h).
        tau: the threshold.

    Raises:
        SecateurError: no heads are similar, or all are.
    """
    values = _values(distances)
    least, largest = values[0], values[-1]
    if tau <= least:
        raise SecateurError(
            f"tau is {tau:g}, which removes nothing: the distances between heads go from {least:.3g} to {largest:.3g}; "
            f"take more than {_above(least)}"
        )
    near = {index: candidates(table, tau) for index, table in distances.items()}
    if _leaves_one(near, distances):
        raise SecateurError(
            f"tau is {tau:g}, which leaves each block a single head: the distances between heads go from {least:.3g} "
            f"to {largest:.3g}; take {'a smaller one' if tau <= largest else f'less than {_below(largest)}'}"
        )
    return Similar(tau, (least, largest), near)


def settle(wish: Wish, distances: Mapping[int, Tensor], tau: float) -> tuple[Similar, dict[int, Width]]:
    """The similar heads, those of them that go, and the widths that this leaves.

    Raises:
        SecateurError: nothing goes, or all but one head of every block.
    """
    found = find(distances, tau)
    removed, widths = {}, {}
    for index, heads in found.candidates.items():
        removed[index], widths[index] = loadable(wish, index, heads)
    if not any(removed.values()):
        first = next((near for near, _, share in thresholds(wish, distances) if share), None)
        more = "no other tau finds any" if first is None else f"take more than {_above(first)}"
        count = sum(map(len, found.candidates.values()))
        raise SecateurError(
            f"tau is {tau:g}, which removes nothing: its {count} similar heads are no whole key/value group, nor one "
            f"of every group; the distances between heads go from {found.range[0]:.3g} to {found.range[1]:.3g}; {more}"
        )
    size = wish.parameters.module
    dense, kept = (
        sum(size(index, "heads", one) for index, one in some.items())
        for some in ({index: wish.blocks[index].width for index in widths}, widths)
    )
    return replace(found, removed=removed, share=1 - kept / dense), widths


def nearest_tau(wish: Wish, distances: Mapping[int, Tensor], share: float) -> float:
    """The threshold at which the share of the chosen blocks' attention parameters that goes is nearest to a wanted one.

    What goes changes only where tau passes a distance, so that all cases are looked at; the middle between two
    neighbouring distances stands for what lies between them. More need not go at a larger tau: a head that becomes a
    candidate can save another one that resembled it.

    Raises:
        SecateurError: nothing can go.
    """
    cases = [(abs(removed - share), tau) for _, tau, removed in thresholds(wish, distances) if removed]
    if not cases:
        raise SecateurError(
            "no tau finds heads that can go: no whole key/value group is similar, nor heads of every one"
        )
    return min(cases)[1]


def thresholds(wish: Wish, distances: Mapping[int, Tensor]) -> Iterator[tuple[float, float, float]]:
    """Every case there is, by ascending tau: the largest distance below it, tau, and the share that goes.

    The share is that of the chosen blocks' attention parameters. What leaves each block a single head, as
    all beyond the largest distance does, is left out.
    """
    pairs = sorted((value, index) for index, table in distances.items() for value in _values({index: table}))
    total = sum(wish.parameters.module(index, "heads", wish.blocks[index].width) for index in distances)
    gone = dict.fromkeys(distances, 0.0)
    near = dict.fromkeys(distances, tuple[int, ...]())
    cases = [(value, {index for _, index in same}) for value, same in groupby(pairs, key=lambda pair: pair[0])]
    for (value, changed), (following, _) in pairwise(cases):
        tau = (value + following) / 2
        for index in changed:
            dense = wish.blocks[index].width
            near[index] = candidates(distances[index], tau)
            _, width = loadable(wish, index, near[index])
            taken = (wish.parameters.module(index, "heads", one) for one in (dense, width))
            gone[index] = next(taken) - next(taken)
        if not _leaves_one(near, distances):
            yield value, tau, sum(gone.values()) / total


def _leaves_one(near: Mapping[int, tuple[int, ...]], distances: Mapping[int, Tensor]) -> bool:
    """Whether all heads of each block are similar but one, which Algorithm 2 leaves."""
    return all(len(heads) == len(distances[index]) - 1 for index, heads in near.items())


def loadable(wish: Wish, index: int, similar: tuple[int, ...]) -> tuple[tuple[int, ...], Width]:
    """The candidates of a block that can go together, and the width that is left.

    Either whole key/value groups, all of whose heads are candidates; or equally many candidates of every group.
    Whichever takes more parameters with it and the output format holds.
    """
    block = wish.blocks[index]
    module = block.attention
    members = [[head for head in similar if head // module.per_group == group] for group in range(module.groups)]
    whole = [group for group, heads in enumerate(members) if len(heads) == module.per_group]
    each = min(map(len, members))
    best: tuple[int, ...] = ()
    width = block.width
    least = wish.parameters.module(index, "heads", width)
    for narrower in _narrower(block):
        by_groups = narrower.groups < module.groups
        count = module.groups - narrower.groups if by_groups else module.per_group - narrower.per_group
        size = wish.parameters.module(index, "heads", narrower)
        if count > (len(whole) if by_groups else each) or size >= least or wish.obstacle(narrower) is not None:
            continue
        least, width = size, narrower
        chosen = [members[group] for group in whole[:count]] if by_groups else [heads[:count] for heads in members]
        best = tuple(sorted(head for heads in chosen for head in heads))
    return best, width


def head_plan(wish: Wish, found: Similar, widths: dict[int, Width]) -> Plan:
    """The plan where heads alone go: exact units, all channels stay."""
    assert found.removed is not None
    keeps = {}
    for index, gone in found.removed.items():
        block = wish.blocks[index]
        heads = tuple(head for head in range(block.attention.units) if head not in gone)
        keeps[index] = Keep(heads, tuple(range(block.feed_forward.units)))
    reached = wish.sparsity(widths)
    return Plan(widths, reached, reached, wish.of, note=found.said(), keeps=keeps)


def with_heads_settled(wish: Wish, widths: Mapping[int, Width]) -> Wish:
    """A wish for the channels alone, to the same end: blocks count as dense once their similar heads have gone.

    Raises:
        SecateurError: the heads alone exceed the target, or the channels cannot make up for the rest.
    """
    blocks = [_narrowed(block, widths[i]) if i in widths else block for i, block in enumerate(wish.blocks)]
    dense = tuple(block.width for block in blocks)
    parameters, meter = replace(wish.parameters, widths=dense), replace(wish.meter, widths=dense)
    before, budget = wish.meter.dense, wish.budget
    over = TOLERANCE * wish.counted if not isinstance(wish.goal, Target) else 0.0
    if meter.dense <= budget - over:
        raise SecateurError(
            f"the similar heads alone take the model from {meter.form(before)} to {meter.form(meter.dense)}, where "
            f"{meter.form(budget)} are allowed; take a smaller tau, or leave the channels out"
        )
    goal: float | Target
    if not isinstance(wish.goal, Target):
        goal = max(0.0, (meter.dense - budget) / wish.counted)
    elif wish.goal.quantity in FASTER:
        goal = replace(wish.goal, value=meter.dense / budget)
    else:
        goal = replace(wish.goal, value=budget / meter.dense if wish.goal.relative else budget)
    result = replace(wish, blocks=blocks, parameters=parameters, meter=meter, goal=goal, kinds=("channels",))
    if result.least > budget + 1e-9 * before:
        raise SecateurError(
            f"with the similar heads gone, the channels can bring the model down to {meter.form(result.least)}, where "
            f"{meter.form(budget)} are wanted; take a larger tau, or let less go"
        )
    return result


def _narrower(block: Block) -> list[Width]:
    """The widths of a block with fewer heads, but some."""
    sizes = attention_widths(block, ("heads",))[1:]
    return [Width(groups, heads, block.feed_forward.units) for groups, heads in sizes]


def _narrowed(block: Block, width: Width) -> Block:
    """A block as if its attention had been built with fewer heads."""
    attention: Depth2 = block.attention
    level2 = replace(attention.level2, units=width.heads)
    return replace(block, attention=replace(attention, level2=level2, groups=width.groups))


def _values(distances: Mapping[int, Tensor]) -> list[float]:
    """Distances of all pairs, ascending."""
    upper = [table[torch.ones_like(table, dtype=torch.bool).triu(1)] for table in distances.values()]
    return torch.cat(upper).sort().values.tolist()


def _above(value: float) -> str:
    """A short number that is surely no smaller."""
    return f"{math.ceil(value * 1e4) / 1e4:g}"


def _below(value: float) -> str:
    """A short number that is surely no larger."""
    return f"{math.floor(value * 1e4) / 1e4:g}"
