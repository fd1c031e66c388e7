"""Widths of all blocks within one budget: one width for every block, or the widths with the lowest total cost.

The size of a model (`plan/meters.py`) and the cost of a plan (`survey/width_costs.py`) are sums over modules. The
widths with the lowest cost are therefore the solution of a separable knapsack problem (`plan/knapsack.py`).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from secateur.model.axes import Width
from secateur.model.structure import PrunableModule
from secateur.plan.knapsack import select_near, select_options, total
from secateur.plan.problem import PlanProblem
from secateur.plan.widths import head_widths
from secateur.survey.width_costs import WidthCosts

UNEQUAL = "its blocks differ in width, and there is no width to which all of them can be cut; use --widths adaptive"
"""Reason why a model that was pruned before cannot get one width for all blocks."""


@dataclass(frozen=True)
class ModuleOptions:
    """Widths that a plan may choose for one module, with the size of the module at each of them."""

    block: int
    """Index of the module's block."""
    module: PrunableModule
    widths: list[Width]
    """Widths of the block, the dense one first; only the numbers along the module's own axes differ."""
    sizes: NDArray[np.float64]
    """Size of the module at each width, in the meter's unit."""


def module_options(problem: PlanProblem) -> list[ModuleOptions]:
    """Return the options of every prunable module of the pruned blocks."""
    result = []
    for index, module in problem.modules:
        widths = problem.widths_of(index, module)
        sizes = [float(problem.meter.module_size(index, module.kind, width)) for width in widths]
        result.append(ModuleOptions(index, module, widths, np.array(sizes)))
    return result


def adaptive_widths(problem: PlanProblem, costs: WidthCosts) -> dict[int, Width] | None:
    """Return the widths of the pruned blocks with the lowest total cost within the budget.

    Returns:
        The width of each pruned block by its index; None if even the narrowest widths exceed the budget by more than
        its slack.
    """
    options = module_options(problem)
    widths = problem.dense_widths
    constant = problem.meter.total(widths) - sum(float(each.sizes[0]) for each in options)
    option_costs = [
        np.array([costs.module_cost(each.block, each.module, width) for width in each.widths]) for each in options
    ]
    sizes, budget = [each.sizes for each in options], problem.budget - constant
    smallest = float(sum(np.min(size) for size in sizes))
    best = select_options(option_costs, sizes, max(budget, min(smallest, budget + problem.slack)))
    if best is None:
        return None
    if problem.slack and total(sizes, best) < budget - problem.slack:
        # Widths are coarse, or units cost nothing: the cheapest plan that removes enough removes too much.
        best = select_near(option_costs, sizes, budget, problem.slack)
    for each, option in zip(options, best, strict=True):
        widths[each.block] |= {axis.name: each.widths[option][axis.name] for axis in each.module.axes}
    return widths


def smallest_size(problem: PlanProblem) -> float:
    """Return the size of the model with every module at its narrowest width, in the meter's unit."""
    dense = problem.meter.total(problem.dense_widths)
    return dense + sum(float(each.sizes.min() - each.sizes[0]) for each in module_options(problem))


@dataclass
class UniformWidths:
    """Results of the search for one width for all blocks."""

    candidates: list[tuple[Width, float]]
    """Widths near the budget, each with the size of the model in the meter's unit."""
    smallest_size: float
    """Size of the model at the narrowest width that the format supports, in the meter's unit."""
    unsupported_reasons: list[str]
    """Reasons why the format cannot hold the widths that were left out."""


def search_uniform_widths(problem: PlanProblem, *, allow_excess: bool) -> UniformWidths:
    """Find the widths that fill the budget best when all pruned blocks get the same width.

    For each number of KV groups and heads, the search looks for the feed-forward width that fills the budget.

    Args:
        problem: The target, and the widths to choose from.
        allow_excess: Also accept a width that exceeds the budget, if it is nearer to the budget than the next
            narrower one.
    """
    dense, meter, budget = problem.reference_block.width, problem.meter, problem.budget
    result = UniformWidths([], meter.dense, [])

    def size(width: Width) -> float:
        return meter.total(problem.uniform_widths(width))

    for every in _width_ladders(problem):
        if every[0] == dense:
            continue
        ladder = _reachable(problem, every)
        reason = problem.unsupported_reason(ladder[0]) if ladder else UNEQUAL
        if reason is not None:
            result.unsupported_reasons.append(reason)
            continue
        result.smallest_size = min(result.smallest_size, size(ladder[0]))
        # The first widths of the ladder, as many as `fitting`, are within the budget.
        fitting = bisect_right(ladder, budget, key=size)
        nearest = ladder[max(0, fitting - 1) : fitting + allow_excess]
        sizes = {width: size(width) for width in nearest if width != dense}
        if sizes:
            result.candidates.append(min(sizes.items(), key=lambda item: abs(item[1] - budget)))
    return result


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
    axes = [axis for axis in block.feed_forward.axes if axis.kind in problem.kinds]
    steps = [[{axis.name: number} for number in reversed(axis.all_numbers(problem.multiple))] for axis in axes]
    dense: list[list[dict[str, int]]] = [[{}]]
    for attention, numbers in product(head_widths(block, problem.kinds), steps or dense):
        yield [attention | number for number in numbers]
