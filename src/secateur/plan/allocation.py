"""The width of each block under one budget: the same for all, or those that together cost least.

What a plan takes is a sum over modules (`plan/meters.py`), and so is what it costs (`survey/prices.py`); the best
widths are then a separable knapsack (`plan/knapsack.py`).
"""

from dataclasses import replace
from itertools import product

import numpy as np

from secateur.model.structure import Width
from secateur.plan.knapsack import choose
from secateur.plan.problem import PlanProblem
from secateur.plan.widths import attention_widths, expert_counts, module_widths, multiple_of
from secateur.survey.prices import Prices


def adaptive(problem: PlanProblem, prices: Prices) -> dict[int, Width] | None:
    """The widths of the chosen blocks that cost least within the budget, or None if nothing is small enough."""
    blocks, meter = problem.blocks, problem.meter
    modules = problem.modules
    options = [
        module_widths(blocks[index], kind, problem.multiple, problem.obstacle, problem.kinds) for index, kind in modules
    ]
    costs, sizes = [], []
    for (index, kind), widths in zip(modules, options, strict=True):
        module = blocks[index].module(kind)
        costs.append(np.array([prices.of(index, module, width) for width in widths]))
        sizes.append(np.array([float(meter.module(index, kind, width)) for width in widths]))
    result = {index: blocks[index].width for index in problem.chosen}
    elsewhere = meter.total(result) - sum(float(size[0]) for size in sizes)
    best = choose(costs, sizes, problem.budget - elsewhere)
    if best is None:
        return None
    for (index, kind), widths, option in zip(modules, options, best.options, strict=True):
        result[index] = result[index].taking(kind, widths[option])
    return result


def narrowest(problem: PlanProblem) -> float:
    """The least that the model can take where each module has its own width, in the meter's unit."""
    blocks, meter = problem.blocks, problem.meter
    total = meter.total({index: blocks[index].width for index in problem.chosen})
    for index, kind in problem.modules:
        widths = module_widths(blocks[index], kind, problem.multiple, problem.obstacle, problem.kinds)
        sizes = [meter.module(index, kind, width) for width in widths]
        total += min(sizes) - sizes[0]
    return total


def uniform(problem: PlanProblem, *, over: bool) -> tuple[list[tuple[Width, float]], float, list[str]]:
    """One width for all chosen blocks: for each way of cutting the attention, feed-forwards that fill the budget.

    With `over`, the nearest width is taken, even if it exceeds the budget by less than the next one falls short of it.

    Returns:
        Widths with what the model takes at them; the least that it can take; and why some cuts were left out.
    """
    meter, budget = problem.meter, problem.budget
    block = problem.leading
    full, kind = block.width, block.feed_forward.kind
    # Narrowest first; experts leave, or channels of every one.
    ways: list[list[Width]] = []
    if kind == "experts" and "experts" in problem.kinds:
        ways.append([replace(full, experts=count) for count in sorted(expert_counts(block.feed_forward))])
    if "channels" in problem.kinds:
        step = multiple_of(full, problem.multiple)
        counts = sorted({full.channels, *range(min(step, full.channels), full.channels, step)})
        ways.append([replace(full, channels=count) for count in counts])
    ways = ways or [[full]]
    found: list[tuple[Width, float]] = []
    reasons: list[str] = []
    least = meter.dense

    def taken(width: Width) -> float:
        return meter.total(problem.everywhere(width))

    for (groups, heads), way in product(attention_widths(block, problem.kinds), ways):
        steps = [replace(width, groups=groups, per_group=heads) for width in way]
        narrow = steps[0]
        if narrow == block.width:
            continue
        reason = problem.obstacle(narrow)
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
