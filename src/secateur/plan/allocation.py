"""The width of each block under one budget: the same for all, or those that together cost least.

What a plan takes is a sum over modules (`plan/meters.py`), and so is what it costs (`survey/width_costs.py`); the best
widths are then a separable knapsack (`plan/knapsack.py`).
"""

from itertools import product

import numpy as np

from secateur.model.axes import Width
from secateur.plan.knapsack import choose
from secateur.plan.problem import PlanProblem
from secateur.plan.widths import head_widths
from secateur.survey.width_costs import WidthCosts


def adaptive(problem: PlanProblem, prices: WidthCosts) -> dict[int, Width] | None:
    """The widths of the chosen blocks that cost least within the budget, or None if nothing is small enough."""
    blocks, meter = problem.blocks, problem.meter
    modules = problem.modules
    options = [problem.widths_of(index, module) for index, module in modules]
    costs, sizes = [], []
    for (index, module), widths in zip(modules, options, strict=True):
        costs.append(np.array([prices.of(index, module, width) for width in widths]))
        sizes.append(np.array([float(meter.module_size(index, module.kind, width)) for width in widths]))
    result = {index: blocks[index].width for index in problem.pruned_blocks}
    elsewhere = meter.total(result) - sum(float(size[0]) for size in sizes)
    best = choose(costs, sizes, problem.budget - elsewhere)
    if best is None:
        return None
    for (index, module), widths, option in zip(modules, options, best.options, strict=True):
        result[index] |= {axis.name: widths[option][axis.name] for axis in module.axes}
    return result


def narrowest(problem: PlanProblem) -> float:
    """The least that the model can take where each module has its own width, in the meter's unit."""
    blocks, meter = problem.blocks, problem.meter
    total = meter.total({index: blocks[index].width for index in problem.pruned_blocks})
    for index, module in problem.modules:
        sizes = [meter.module_size(index, module.kind, width) for width in problem.widths_of(index, module)]
        total += min(sizes) - sizes[0]
    return total


def uniform(problem: PlanProblem, *, over: bool) -> tuple[list[tuple[Width, float]], float, list[str]]:
    """One width for all chosen blocks: for each way of cutting the attention, feed-forwards that fill the budget.

    With `over`, the nearest width is taken, even if it exceeds the budget by less than the next one falls short of it.

    Returns:
        Widths with what the model takes at them; the least that it can take; and why some cuts were left out.
    """
    meter, budget = problem.meter, problem.budget
    block = problem.reference_block
    # Narrowest first; experts leave, or channels of every one.
    axes = [axis for axis in block.feed_forward.axes if axis.kind in problem.kinds]
    ways = [[{axis.name: number} for number in reversed(axis.all_numbers(problem.multiple))] for axis in axes] or [[{}]]
    found: list[tuple[Width, float]] = []
    reasons: list[str] = []
    least = meter.dense

    def taken(width: Width) -> float:
        return meter.total(problem.uniform_widths(width))

    for heads, way in product(head_widths(block, problem.kinds), ways):
        steps = [heads | numbers for numbers in way]
        narrow = steps[0]
        if narrow == block.width:
            continue
        reason = problem.unsupported_reason(narrow)
        if reason is not None:
            reasons.append(reason)
            continue
        least = min(least, taken(narrow))
        low, high = -1, len(steps) - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if taken(steps[middle]) <= budget else (low, middle - 1)
        near = [at for at in ((low, low + 1) if over else (low,)) if 0 <= at < len(steps)]
        tried = [(steps[at], taken(steps[at])) for at in near]
        tried = [(width, size) for width, size in tried if width != block.width]
        if tried:
            found.append(min(tried, key=lambda one: abs(one[1] - budget)))
    return found, least, reasons
