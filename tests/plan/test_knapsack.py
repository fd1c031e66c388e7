"""The knapsack solver equals an enumeration of all selections."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.plan import knapsack
from secateur.plan.knapsack import select_near, select_options, total

Instance = tuple[list[Any], list[Any], float]


def brute(costs: Sequence[Any], sizes: Sequence[Any], budget: float) -> float | None:
    """Return the lowest cost within the budget, by enumeration."""
    selections = itertools.product(*(range(len(cost)) for cost in costs))
    within = [
        sum(float(cost[o]) for cost, o in zip(costs, selection, strict=True))
        for selection in selections
        # Not as Python's own floats, whose sums Python 3.12 and newer round otherwise than numpy's.
        if sum(size[o] for size, o in zip(sizes, selection, strict=True)) <= budget
    ]
    return min(within, default=None)


def check(instance: Instance) -> None:
    costs, sizes, budget = instance
    found, least = select_options(costs, sizes, budget), brute(costs, sizes, budget)
    if least is None:
        assert found is None
        return
    assert total(sizes, found) <= budget
    assert total(costs, found) == pytest.approx(least, rel=1e-8, abs=1e-8 * max(np.abs(cost).max() for cost in costs))


@st.composite
def instances(draw: Any, cost: Any, size: Any, exact: bool) -> Instance:
    counts = draw(st.lists(st.integers(2, 6), min_size=3, max_size=6).filter(lambda c: np.prod(c) <= 6000))
    costs = [np.array(draw(st.lists(cost, min_size=n, max_size=n)), dtype=np.float64) for n in counts]
    sizes = [np.array(draw(st.lists(size, min_size=n, max_size=n)), dtype=np.float64) for n in counts]
    low, high = sum(s.min() for s in sizes), sum(s.max() for s in sizes)
    budget = float(low + draw(st.floats(-0.1, 1.1)) * (high - low))
    return costs, sizes, float(round(budget)) if exact else budget


few = st.integers(0, 5)
integers = st.integers(0, 10**7)
floats = st.floats(0, 1e3, allow_subnormal=False)


@pytest.mark.parametrize(
    ("cost", "size", "exact"),
    [
        (few, few, True),
        (floats, integers, True),
        (integers, integers, True),
        (floats, floats, False),
        (st.floats(-10, 10, allow_subnormal=False), few, True),
        (st.floats(0, 1e-6, allow_subnormal=False), integers, True),
        (st.sampled_from([0.0, 1e-9, 1.0, 1e9]), st.sampled_from([0, 1, 2, 10**9]), True),
    ],
    ids=["ties", "integer sizes", "integers", "floats", "negative costs", "small costs", "wide ranges"],
)
def test_the_selection_is_the_cheapest(cost, size, exact):
    @settings(max_examples=100, deadline=None)
    @given(instances(cost, size, exact))
    def run(instance: Instance) -> None:
        check(instance)

    run()


@settings(max_examples=200, deadline=None)
@given(instances(floats, integers, True), st.integers(0, 3 * 10**6))
def test_the_selection_near_a_target_is_the_cheapest_within_the_slack_or_the_nearest(instance, slack):
    costs, sizes, target = instance
    found = select_near(costs, sizes, target, slack)
    every = zip(*(map(sum, itertools.product(*values)) for values in (costs, sizes)), strict=True)
    near, cost = min((max(abs(size - target) - slack, 0.0), cost) for cost, size in every)
    assert max(abs(total(sizes, found) - target) - slack, 0.0) == near
    assert total(costs, found) == pytest.approx(cost, rel=1e-8, abs=1e-5)


def large(seed: int, modules: int, options: int, convex: bool) -> Instance:
    """Return costs that rise as units are removed, and realistic numbers of parameters."""
    rng = np.random.default_rng(seed)
    costs, sizes = [], []
    for _ in range(modules):
        steps = rng.exponential(rng.lognormal(0, 1), options - 1)
        curve = np.concatenate([[0.0], np.cumsum(np.sort(steps) if convex else steps)])
        costs.append(curve)
        sizes.append((options - 1 - np.arange(options)) * float(rng.choice([1728, 2304, 110_592])))
    return costs, sizes, 0.7 * sum(size.max() for size in sizes)


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize(("modules", "options"), [(160, 100), (64, 1500)])
def test_selections_of_large_instances_are_within_the_budget(modules, options, convex):
    costs, sizes, budget = large(1, modules, options, convex)
    assert total(sizes, select_options(costs, sizes, budget)) <= budget


def test_a_limit_on_partial_sums_gives_a_good_selection(monkeypatch):
    monkeypatch.setattr(knapsack, "MAX_STATES", 3)
    rng, ratios = np.random.default_rng(2), []
    for _ in range(30):
        sizes = [rng.integers(1, 1000, 5).astype(float) for _ in range(5)]
        costs = [1000 / size + rng.random(5) for size in sizes]
        budget = float(sum(np.median(size) for size in sizes))
        found = select_options(costs, sizes, budget)
        assert total(sizes, found) <= budget
        ratios.append(total(costs, found) / brute(costs, sizes, budget))
    assert 1 < max(ratios) < 1.1
