"""The separable knapsack: one option for every module, least total cost within a budget, solved exactly.

A Lagrangian gives a lower bound and, with a repair, a good solution; the gap between the two then rules out most
options and most partial sums of a dynamic programme over the rest, so that exact integers of any size are cheap.

With a multiplier m >= 0, the reduced cost of option o of a module is r(o) = c(o) + m s(o) - min over its options.
Any selection within the budget B costs L + sum r + m (B - S), where L is the dual bound and S <= B its size: what
exceeds the best known cost already by its reduced costs can be left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

STATES = 10_000
"""Most partial sums held at once. Beyond it only the best are kept: still within the budget, no longer proven best."""


@dataclass(frozen=True)
class Choice:
    """A solution."""

    options: tuple[int, ...]
    """The chosen option of every module."""
    cost: float
    size: float
    proven: bool
    """Whether no other selection within the budget costs less (to rounding)."""


def choose(costs: Sequence[Floats], sizes: Sequence[Floats], budget: float) -> Choice | None:
    """The cheapest selection of one option a module with a total size within the budget.

    Args:
        costs: for each module, what each option costs; finite.
        sizes: for each module, what each option takes of the budget.
        budget: in the unit of `sizes`.

    Returns:
        The selection, or None if even the smallest options exceed the budget.

    Example:
        Two modules have three widths each; narrow ones cost more and take less of the budget. Here the first module is
        worth keeping whole:

        >>> costs = [np.array([9.0, 2.0, 0.0]), np.array([5.0, 4.0, 0.0])]
        >>> sizes = [np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0])]
        >>> choice = choose(costs, sizes, budget=4.0)
        >>> choice.options, float(choice.cost), float(choice.size)
        ((2, 0), 5.0, 4.0)
    """
    if sum(np.min(size) for size in sizes) > budget:
        return None
    multiplier = _multiplier(costs, sizes, budget)
    known = _repaired(costs, sizes, budget, _cheapest(costs, sizes, multiplier))
    best = sum(cost[o] for cost, o in zip(costs, known, strict=True))
    reduced = [cost + multiplier * size for cost, size in zip(costs, sizes, strict=True)]
    bound = sum(np.min(values) for values in reduced) - multiplier * budget
    # A little more than the gap, so that rounding does not drop the known solution itself.
    gap = max(best - bound, 0.0) + 1e-9 * (abs(best) + abs(bound))
    found, proven = _programme([values - np.min(values) for values in reduced], sizes, budget, multiplier, gap)
    options = min((known, found) if found else (known,), key=lambda o: _total(costs, o))
    return Choice(tuple(options), _total(costs, options), _total(sizes, options), proven)


def _total(values: Sequence[Floats], options: Sequence[int]) -> float:
    return float(sum(value[o] for value, o in zip(values, options, strict=True)))


def _cheapest(costs: Sequence[Floats], sizes: Sequence[Floats], multiplier: float) -> list[int]:
    """Each module's best option at a price per unit of size; of equals, the smallest."""
    result = []
    for cost, size in zip(costs, sizes, strict=True):
        values = cost + multiplier * size
        tied = np.flatnonzero(values <= np.min(values))
        result.append(int(tied[np.argmin(size[tied])]))
    return result


def _multiplier(costs: Sequence[Floats], sizes: Sequence[Floats], budget: float) -> float:
    """The smallest price, to rounding, at which the cheapest options fit the budget."""
    if _total(sizes, _cheapest(costs, sizes, 0.0)) <= budget:
        return 0.0
    high = 1.0
    while _total(sizes, _cheapest(costs, sizes, high)) > budget:
        high *= 4
        if high > 1e300:
            break
    low = 0.0
    for _ in range(200):
        middle = (low + high) / 2 if low else high / 16
        fits = _total(sizes, _cheapest(costs, sizes, middle)) <= budget
        low, high = (low, middle) if fits else (middle, high)
        if high - low <= 1e-13 * high:
            break
    return high


def _repaired(costs: Sequence[Floats], sizes: Sequence[Floats], budget: float, options: list[int]) -> list[int]:
    """Make a selection fit, then spend what is left of the budget, each by the best single changes."""
    if _total(sizes, options) > budget:
        options = [int(np.argmin(s)) for s in sizes]
    while True:
        room = budget - _total(sizes, options)
        changes = []
        for module, (cost, own) in enumerate(zip(costs, sizes, strict=True)):
            gain = cost[options[module]] - cost
            gain[own - own[options[module]] > room] = 0.0
            option = int(np.argmax(gain))
            if gain[option] > 0:
                changes.append((float(gain[option]), module, option))
        for _, module, option in sorted(changes, reverse=True):
            changed = [*options[:module], option, *options[module + 1 :]]
            # Differences are rounded, so that what seemed to fit may not.
            if _total(sizes, changed) <= budget:
                options = changed
                break
        else:
            return options


def _programme(
    reduced: Sequence[Floats], sizes: Sequence[Floats], budget: float, multiplier: float, gap: float
) -> tuple[list[int] | None, bool]:
    """Pareto fronts of (reduced cost, size) module by module, cut off at the gap; the options, and if all were kept."""
    open_options = [np.flatnonzero(values <= gap) for values in reduced]
    least = [float(np.min(size[o])) for size, o in zip(sizes, open_options, strict=True)]
    front_r, front_s = np.zeros(1), np.zeros(1)
    trail: list[tuple[Integers, Integers]] = []
    whole = True
    for module, (values, size, options) in enumerate(zip(reduced, sizes, open_options, strict=True)):
        rest = sum(least[module + 1 :])
        # Sums in another order are rounded otherwise; the last one, of all modules, is the size itself.
        limit = budget - rest + (1e-12 * abs(budget) if rest else 0.0)
        r = (front_r[:, None] + values[options]).ravel()
        s = (front_s[:, None] + size[options]).ravel()
        alive = np.flatnonzero((r <= gap) & (s <= limit))
        # What is compared is the true cost, r - multiplier * s up to a constant; of equal sizes, the cheapest.
        true = r[alive] - multiplier * s[alive]
        order = alive[np.lexsort((true, s[alive]))]
        true = r[order] - multiplier * s[order]
        falling = np.ones(len(order), dtype=bool)
        falling[1:] = true[1:] < np.minimum.accumulate(true)[:-1]
        order = order[falling]
        if len(order) > STATES:
            whole = False
            order = np.sort(order[np.argpartition(r[order], STATES)[:STATES]])
        trail.append((order // len(options), options[order % len(options)]))
        front_r, front_s = r[order], s[order]
        if not len(order):
            return None, whole
    at = int(np.argmin(front_r - multiplier * front_s))
    chosen = []
    for parents, options in reversed(trail):
        chosen.append(int(options[at]))
        at = int(parents[at])
    return chosen[::-1], whole
