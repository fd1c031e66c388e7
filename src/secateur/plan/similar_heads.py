"""From distances between heads to those that go: the threshold, and what a block can do without and still be loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import groupby, pairwise

from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.criteria.similarity import SimilarHeads, above, all_distances, candidates, find_similar_heads, leaves_one
from secateur.model.structure import Block, Depth2, Kind, Width
from secateur.plan.allocation import narrowest
from secateur.plan.problem import TOLERANCE, Plan, PlanProblem
from secateur.plan.target import FASTER, Target
from secateur.plan.widths import attention_widths


def check_heads(problem: PlanProblem) -> None:
    """See that some head can go, before anything is measured.

    Raises:
        SecateurError: the model or the output format holds no fewer heads.
    """
    reasons = []
    for index in problem.chosen:
        block = problem.blocks[index]
        if block.attention.locked:
            raise SecateurError(f"heads cannot be removed exactly, as {block.attention.locked}; take another criterion")
        obstacles = [problem.obstacle(width) for width in _narrower(block)]
        if None in obstacles:
            return
        reasons += [reason for reason in obstacles if reason is not None]
    if reasons:
        raise SecateurError(f"the format cannot hold fewer heads: {reasons[0]}")
    raise SecateurError("the blocks have one head each; similarity has nothing to compare: take another criterion")


def settle(problem: PlanProblem, distances: Mapping[int, Tensor], tau: float) -> tuple[SimilarHeads, dict[int, Width]]:
    """The similar heads, those of them that go, and the widths that this leaves.

    Raises:
        SecateurError: nothing goes, or all but one head of every block.
    """
    found = find_similar_heads(distances, tau)
    removed, widths = {}, {}
    for index, heads in found.candidates.items():
        removed[index], widths[index] = loadable(problem, index, heads)
    if not any(removed.values()):
        first = next((near for near, _, share in thresholds(problem, distances) if share), None)
        more = "no other tau finds any" if first is None else f"take more than {above(first)}"
        count = sum(map(len, found.candidates.values()))
        raise SecateurError(
            f"tau is {tau:g}, which removes nothing: its {count} similar heads are no whole key/value group, nor one "
            f"of every group; the distances between heads go from {found.range[0]:.3g} to {found.range[1]:.3g}; {more}"
        )
    size = problem.parameters.module
    dense, kept = (
        sum(size(index, "heads", one) for index, one in some.items())
        for some in ({index: problem.blocks[index].width for index in widths}, widths)
    )
    return replace(found, removed=removed, share=1 - kept / dense), widths


def nearest_tau(problem: PlanProblem, distances: Mapping[int, Tensor], share: float) -> float:
    """The threshold at which the share of the chosen blocks' attention parameters that goes is nearest to a wanted one.

    What goes changes only where tau passes a distance, so that all cases are looked at; the middle between two
    neighbouring distances stands for what lies between them. More need not go at a larger tau: a head that becomes a
    candidate can save another one that resembled it.

    Raises:
        SecateurError: nothing can go.
    """
    cases = [(abs(removed - share), tau) for _, tau, removed in thresholds(problem, distances) if removed]
    if not cases:
        raise SecateurError(
            "no tau finds heads that can go: no whole key/value group is similar, nor heads of every one"
        )
    return min(cases)[1]


def thresholds(problem: PlanProblem, distances: Mapping[int, Tensor]) -> Iterator[tuple[float, float, float]]:
    """Every case there is, by ascending tau: the largest distance below it, tau, and the share that goes.

    The share is that of the chosen blocks' attention parameters. What leaves each block a single head, as
    all beyond the largest distance does, is left out.
    """
    pairs = sorted((value, index) for index, table in distances.items() for value in all_distances({index: table}))
    total = sum(problem.parameters.module(index, "heads", problem.blocks[index].width) for index in distances)
    gone = dict.fromkeys(distances, 0.0)
    near = dict.fromkeys(distances, tuple[int, ...]())
    cases = [(value, {index for _, index in same}) for value, same in groupby(pairs, key=lambda pair: pair[0])]
    for (value, changed), (following, _) in pairwise(cases):
        tau = (value + following) / 2
        for index in changed:
            dense = problem.blocks[index].width
            near[index] = candidates(distances[index], tau)
            _, width = loadable(problem, index, near[index])
            taken = (problem.parameters.module(index, "heads", one) for one in (dense, width))
            gone[index] = next(taken) - next(taken)
        if not leaves_one(near, distances):
            yield value, tau, sum(gone.values()) / total


def loadable(problem: PlanProblem, index: int, similar: tuple[int, ...]) -> tuple[tuple[int, ...], Width]:
    """The candidates of a block that can go together, and the width that is left.

    Either whole key/value groups, all of whose heads are candidates; or equally many candidates of every group.
    Whichever takes more parameters with it and the output format holds.
    """
    block = problem.blocks[index]
    module = block.attention
    members = [[head for head in similar if head // module.per_group == group] for group in range(module.groups)]
    whole = [group for group, heads in enumerate(members) if len(heads) == module.per_group]
    each = min(map(len, members))
    best: tuple[int, ...] = ()
    width = block.width
    least = problem.parameters.module(index, "heads", width)
    for narrower in _narrower(block):
        by_groups = narrower.groups < module.groups
        count = module.groups - narrower.groups if by_groups else module.per_group - narrower.per_group
        size = problem.parameters.module(index, "heads", narrower)
        if count > (len(whole) if by_groups else each) or size >= least or problem.obstacle(narrower) is not None:
            continue
        least, width = size, narrower
        chosen = [members[group] for group in whole[:count]] if by_groups else [heads[:count] for heads in members]
        best = tuple(sorted(head for heads in chosen for head in heads))
    return best, width


def settled_units(problem: PlanProblem, found: SimilarHeads) -> dict[int, dict[Kind, tuple[int, ...]]]:
    """The heads that stay in every block."""
    assert found.removed is not None
    return {
        index: {"heads": tuple(head for head in range(problem.blocks[index].attention.units) if head not in gone)}
        for index, gone in found.removed.items()
    }


def head_plan(problem: PlanProblem, found: SimilarHeads, widths: dict[int, Width]) -> Plan:
    """The plan where heads alone go: exact units, all channels stay."""
    units = settled_units(problem, found)
    for index, kept in units.items():
        kept["channels"] = tuple(range(problem.blocks[index].feed_forward.units))
    reached = problem.sparsity(widths)
    return Plan(widths, reached, reached, problem.of, note=found.said(), units=units)


def with_heads_settled(problem: PlanProblem, widths: Mapping[int, Width]) -> PlanProblem:
    """A problem for the channels alone, to the same end: blocks count as dense once their similar heads have gone.

    Raises:
        SecateurError: the heads alone exceed the target, or the channels cannot make up for the rest.
    """
    blocks = [_narrowed(block, widths[i]) if i in widths else block for i, block in enumerate(problem.blocks)]
    dense = tuple(block.width for block in blocks)
    parameters, meter = replace(problem.parameters, widths=dense), replace(problem.meter, widths=dense)
    before, budget = problem.meter.dense, problem.budget
    over = TOLERANCE * problem.counted if not isinstance(problem.goal, Target) else 0.0
    if meter.dense <= budget - over:
        raise SecateurError(
            f"the similar heads alone take the model from {meter.form(before)} to {meter.form(meter.dense)}, where "
            f"{meter.form(budget)} are allowed; take a smaller tau, or leave the channels out"
        )
    goal: float | Target
    if not isinstance(problem.goal, Target):
        goal = max(0.0, (meter.dense - budget) / problem.counted)
    elif problem.goal.quantity in FASTER:
        goal = replace(problem.goal, value=meter.dense / budget)
    else:
        goal = replace(problem.goal, value=budget / meter.dense if problem.goal.relative else budget)
    result = replace(problem, blocks=blocks, parameters=parameters, meter=meter, goal=goal, kinds=("channels",))
    least = narrowest(result)
    if least > budget + 1e-9 * before:
        raise SecateurError(
            f"with the similar heads gone, the channels can bring the model down to {meter.form(least)}, where "
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
