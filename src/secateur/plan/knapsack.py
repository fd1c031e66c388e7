"""Exact solver of the separable knapsack problem: one option per module, least total cost within a budget.

The solver has three steps:

1. The Lagrangian relaxation gives a lower bound on the cost.
2. A greedy repair turns the relaxed solution into one that fits the budget.
3. Dynamic programming finds the best solution. The gap between the bound and the repaired solution excludes most
   options and most partial sums, so that sizes may be integers of any magnitude.

With a multiplier m >= 0, the reduced cost of option o of a module, with cost c(o) and size s(o), is
r(o) = c(o) + m s(o) - min over the module's options. A selection of size S <= B, where B is the budget, costs
L + sum r + m (B - S), where L is the lower bound. A partial selection whose reduced costs already exceed the gap
therefore cannot be part of a better solution.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Options = tuple[int, ...]
"""Index of the selected option of each module."""

MAX_STATES = 10_000
"""Largest number of partial sums to keep. If more arise, only the best are kept: the result still fits the budget but
may not be the best."""


def select_options(costs: Sequence[Floats], sizes: Sequence[Floats], budget: float) -> Options | None:
    """Select one option for each module so that the total cost is lowest and the total size is within the budget.

    Args:
        costs: For each module, the cost of each option; finite.
        sizes: For each module, the size of each option.
        budget: Largest total size, in the unit of `sizes`.

    Returns:
        The selection; None if even the smallest options exceed the budget.

    Example:
        Two modules have three widths each. A narrow width costs more and takes less of the budget. Here the first
        module stays dense:

        >>> costs = [np.array([9.0, 2.0, 0.0]), np.array([5.0, 4.0, 0.0])]
        >>> sizes = [np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0])]
        >>> select_options(costs, sizes, budget=4.0)
        (2, 0)
    """
    if sum(np.min(size) for size in sizes) > budget:
        return None
    multiplier = _multiplier(costs, sizes, budget)
    repaired = _repair(costs, sizes, budget, _relaxed_options(costs, sizes, multiplier))
    best = total(costs, repaired)
    reduced = [cost + multiplier * size for cost, size in zip(costs, sizes, strict=True)]
    bound = sum(np.min(values) for values in reduced) - multiplier * budget
    # A little more than the gap, so that rounding does not exclude the repaired solution itself.
    gap = max(best - bound, 0.0) + 1e-9 * (abs(best) + abs(bound))
    reduced = [values - np.min(values) for values in reduced]
    found = _dynamic_programme(reduced, sizes, budget, multiplier, gap)
    return min((repaired, found or repaired), key=lambda options: total(costs, options))


def select_near(costs: Sequence[Floats], sizes: Sequence[Floats], target: float, slack: float) -> Options:
    """Select one option for each module so that the total size is near a target.

    Returns:
        The selection of lowest cost whose size is within `slack` of the target; if there is none, the nearest one.
    """
    largest = [np.max(size) for size in sizes]
    spare = [most - size for most, size in zip(largest, sizes, strict=True)]
    bounded = (
        select_options(costs, sizes, target + slack),
        # The lowest cost of all sizes that are large enough.
        select_options(costs, spare, float(sum(largest)) - target + slack),
    )
    for found in bounded:
        if found and abs(total(sizes, found) - target) <= slack:
            return found

    def cheapest_of_each_size(_: int, c: Floats, s: Floats) -> Integers:
        """Return the cheapest sum of each size; of too many sizes, one in each of `MAX_STATES` intervals."""
        keys, places = np.unique(s), s
        if len(keys) > MAX_STATES:
            places = np.floor((s - keys[0]) * (MAX_STATES / (keys[-1] - keys[0])))
        order = np.lexsort((c, places))
        return order[np.diff(places[order], prepend=-np.inf) > 0]

    def nearest(c: Floats, s: Floats) -> int:
        away = np.abs(s - target)
        return int(np.lexsort((c, np.where(away <= slack, 0.0, away)))[0])

    found = _add_up(costs, sizes, cheapest_of_each_size, nearest)
    assert found is not None
    return found


def total(values: Sequence[Floats], options: Options) -> float:
    """Return the sum of the values of the selected options."""
    return float(sum(value[o] for value, o in zip(values, options, strict=True)))


def _relaxed_options(costs: Sequence[Floats], sizes: Sequence[Floats], multiplier: float) -> Options:
    """Return the option of each module with the lowest cost + multiplier * size; among equals, the smallest."""
    result = []
    for cost, size in zip(costs, sizes, strict=True):
        values = cost + multiplier * size
        tied = np.flatnonzero(values <= np.min(values))
        result.append(int(tied[np.argmin(size[tied])]))
    return tuple(result)


def _multiplier(costs: Sequence[Floats], sizes: Sequence[Floats], budget: float) -> float:
    """Return the smallest multiplier, up to rounding, at which the options of lowest cost fit the budget."""
    if total(sizes, _relaxed_options(costs, sizes, 0.0)) <= budget:
        return 0.0
    high = 1.0
    while total(sizes, _relaxed_options(costs, sizes, high)) > budget:
        high *= 4
        if high > 1e300:
            break
    low = 0.0
    for _ in range(200):
        middle = (low + high) / 2 if low else high / 16
        fits = total(sizes, _relaxed_options(costs, sizes, middle)) <= budget
        low, high = (low, middle) if fits else (middle, high)
        if high - low <= 1e-13 * high:
            break
    return high


def _repair(costs: Sequence[Floats], sizes: Sequence[Floats], budget: float, options: Options) -> Options:
    """Return a selection that fits the budget, improved by single changes until no single change lowers the cost."""
    if total(sizes, options) > budget:
        options = tuple(int(np.argmin(size)) for size in sizes)
    while True:
        room = budget - total(sizes, options)
        changes = []
        for module, (cost, size) in enumerate(zip(costs, sizes, strict=True)):
            gain = cost[options[module]] - cost
            gain[size - size[options[module]] > room] = 0.0
            option = int(np.argmax(gain))
            if gain[option] > 0:
                changes.append((float(gain[option]), module, option))
        for _, module, option in sorted(changes, reverse=True):
            changed = (*options[:module], option, *options[module + 1 :])
            # The differences of sizes are rounded, so that a change may exceed the budget after all.
            if total(sizes, changed) <= budget:
                options = changed
                break
        else:
            return options


def _dynamic_programme(
    reduced: Sequence[Floats], sizes: Sequence[Floats], budget: float, multiplier: float, gap: float
) -> Options | None:
    """Return the best selection on the Pareto front of (reduced cost, size); None if the gap excludes all."""
    candidates = [np.flatnonzero(values <= gap) for values in reduced]
    reduced, sizes = (
        [values[options] for values, options in zip(every, candidates, strict=True)] for every in (reduced, sizes)
    )
    least = [float(np.min(size)) for size in sizes]

    def pareto_front(module: int, r: Floats, s: Floats) -> Integers:
        """Return the sums within the gap and the budget that no smaller sum undercuts in cost."""
        rest = sum(least[module + 1 :])
        # The order of a sum changes its rounding. The last sum, over all modules, is the exact size.
        limit = budget - rest + (1e-12 * abs(budget) if rest else 0.0)
        alive = np.flatnonzero((r <= gap) & (s <= limit))
        # Sums are compared by their true cost, which is r - multiplier * s up to a constant. Among sums of equal
        # size, only the cheapest is kept.
        true = r - multiplier * s
        order = alive[np.lexsort((true[alive], s[alive]))]
        falling = np.ones(len(order), dtype=bool)
        falling[1:] = true[order][1:] < np.minimum.accumulate(true[order])[:-1]
        order = order[falling]
        if len(order) > MAX_STATES:
            order = np.sort(order[np.argpartition(r[order], MAX_STATES)[:MAX_STATES]])
        return order

    found = _add_up(reduced, sizes, pareto_front, lambda r, s: int(np.argmin(r - multiplier * s)))
    return found and tuple(int(options[o]) for options, o in zip(candidates, found, strict=True))


def _add_up(
    costs: Sequence[Floats],
    sizes: Sequence[Floats],
    kept: Callable[[int, Floats, Floats], Integers],
    best: Callable[[Floats, Floats], int],
) -> Options | None:
    """Add up the costs and the sizes of options module by module, and return the best selection.

    Args:
        costs, sizes: See `select_options`.
        kept: Function from the number of a module, and the costs and sizes of all sums up to it, to the sums to keep.
        best: Function from the costs and sizes of the last sums to the best of them.

    Returns:
        The selection; None if no sum is kept.
    """
    front_c, front_s = np.zeros(1), np.zeros(1)
    trail: list[tuple[Integers, Integers]] = []
    for module, (cost, size) in enumerate(zip(costs, sizes, strict=True)):
        c, s = (front_c[:, None] + cost).ravel(), (front_s[:, None] + size).ravel()
        order = kept(module, c, s)
        if not len(order):
            return None
        trail.append((order // len(cost), order % len(cost)))
        front_c, front_s = c[order], s[order]
    at = best(front_c, front_s)
    options = []
    for parents, selected in reversed(trail):
        options.append(int(selected[at]))
        at = int(parents[at])
    return tuple(reversed(options))
