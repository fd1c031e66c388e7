"""Plans with one width for all blocks."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import product

from secateur.base.errors import SecateurError
from secateur.model.axes import FEED_FORWARD, Width
from secateur.plan.problem import Plan, PlanProblem
from secateur.plan.reach import nothing_to_remove, out_of_reach
from secateur.plan.target import Target
from secateur.plan.widths import head_widths

UNEQUAL = "its blocks differ in width, and there is no width to which all of them can be cut; use --widths adaptive"
"""Reason why a model that was pruned before cannot get one width for all blocks."""


def uniform_plans(problem: PlanProblem) -> list[Plan]:
    """Return every plan with one width for all blocks that reaches the target, the nearest to the target first.

    The plans differ in how much they remove from the attention and how much from the feed-forward: for each number of
    KV groups and heads, one has the feed-forward width that fills the budget.

    Raises:
        SecateurError: No such plan reaches the target.
    """
    dense, budget, smallest = problem.reference_block.width, problem.budget, problem.meter.dense
    # A sparsity may be exceeded by a width that is nearer to it; any other target is an upper bound.
    allow_excess = not isinstance(problem.target, Target)
    nearest: list[Width] = []
    reasons: list[str] = []

    def size(width: Width) -> float:
        return problem.meter.total(problem.uniform_widths(width))

    def distance(width: Width) -> float:
        return abs(size(width) - budget)

    for every in _width_ladders(problem):
        if every[0] == dense:
            continue
        ladder = _reachable(problem, every)
        reason = problem.unsupported_reason(ladder[0]) if ladder else UNEQUAL
        if reason is not None:
            reasons.append(reason)
            continue
        smallest = min(smallest, size(ladder[0]))
        # The first widths of the ladder, as many as `fitting`, are within the budget.
        fitting = bisect_right(ladder, budget, key=size)
        near = [width for width in ladder[max(0, fitting - 1) : fitting + allow_excess] if width != dense]
        nearest += sorted(near, key=distance)[:1]
    if smallest == problem.meter.dense:
        raise SecateurError(nothing_to_remove(problem, reasons))
    if not nearest or smallest > budget + problem.slack:
        raise out_of_reach(problem, smallest, reasons)
    plans = [problem.plan(problem.uniform_widths(width)) for width in sorted(nearest, key=distance)]
    return [one for one in plans if one.note is None] or plans[:1]


def uniform_alternative(problem: PlanProblem, sparsity: float) -> str:
    """Return the end of an error message: the options for the plan with one width for all blocks that is nearest to a
    sparsity; empty if there is none."""
    with suppress(SecateurError):
        nearest = uniform_plans(replace(problem, target=sparsity, meter=problem.parameters))[0]
        return f"; the nearest that fits: --widths uniform --sparsity {nearest.sparsity:.3g}"
    return ""


def _reachable(problem: PlanProblem, ladder: list[Width]) -> list[Width]:
    """Return the first widths of a list of widths that all blocks can get; blocks may differ after an earlier
    pruning."""
    end = bisect_left(ladder, True, key=lambda width: not problem.can_become(problem.uniform_widths(width)))
    return ladder[:end]


def _width_ladders(problem: PlanProblem) -> Iterator[list[Width]]:
    """Yield lists of widths, narrowest first, that differ along one axis of the feed-forward only.

    There is one list for each attention width and each prunable axis of the feed-forward.
    """
    block = problem.reference_block
    axes = [axis for axis in block.axes_in(FEED_FORWARD) if axis.kind in problem.kinds]
    steps = [[{axis.name: number} for number in reversed(axis.all_numbers(problem.multiple))] for axis in axes]
    dense: list[list[dict[str, int]]] = [[{}]]
    for attention, numbers in product(head_widths(block, problem.kinds), steps or dense):
        yield [attention | number for number in numbers]
