"""Costs of widths: interpolation between probes, computed by hand, and properties that hold for any survey."""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import blocks_of, build, wide
from secateur.model.structure import Block
from secateur.survey.curves import ErrorCurve, Probe, Survey
from secateur.survey.width_costs import WidthCosts


@cache
def block() -> Block:
    """Return a block with three KV groups of two heads, and 72 channels."""
    return blocks_of(build("llama"))[0]


def survey(curves: Sequence[ErrorCurve], probes: Sequence[Probe] = ()) -> Survey:
    return Survey("l1", 0.3, 64, tuple(curves), tuple(probes))


def channels(errors: Sequence[float], energy: float = 1.0) -> ErrorCurve:
    return ErrorCurve(0, "channels", "channels", tuple(errors), energy)


def cost(found: WidthCosts, gone: int) -> float:
    return found.module_cost(0, block().modules[-1], wide(3, 2, 72 - gone))


BASE = 1e-6
"""Error of the dense module in the curve, which has no cost."""
CURVE = channels([BASE, BASE + 5e-5, BASE + 1e-4, BASE + 2e-4, BASE + 4e-4, BASE + 0.02, BASE + 1.0])
PROBES = [
    Probe(0, "channels", 1e-4, False, 0.01),
    Probe(0, "channels", 4e-4, False, 0.08),
    Probe(0, "channels", 1.0, True, 0.5),
]


def test_costs_are_interpolated_on_a_logarithmic_scale():
    found, other = WidthCosts(survey([CURVE], PROBES)), WidthCosts(survey([CURVE], PROBES[::-1]))
    assert [cost(found, gone) for gone in range(6)] == [cost(other, gone) for gone in range(6)]
    assert cost(found, 0) == 0
    # Below the first probe in proportion; at a probe what it says.
    assert cost(found, 1) == pytest.approx(0.005, rel=1e-6)
    assert cost(found, 2) == pytest.approx(0.01, rel=1e-6)
    # Half way between errors of 1 and 4, of costs 1 and 8.
    assert cost(found, 3) == pytest.approx(0.01 * 8**0.5, rel=1e-6)
    assert cost(found, 4) == pytest.approx(0.08, rel=1e-6)
    # 0.02 is 50 of the 2500 times between the last probe and the whole: half way again.
    assert cost(found, 5) == pytest.approx((0.08 * 0.5) ** 0.5, rel=1e-6)
    assert cost(found, 72) == 0.5


def test_a_partial_cut_may_cost_more_than_the_removal():
    """Wider cuts then cost at least as much as the partial cut; the removal costs what was measured."""
    found = WidthCosts(survey([CURVE], [*PROBES[:2], Probe(0, "channels", 1.0, True, 0.02)]))
    assert cost(found, 5) == pytest.approx(0.08, rel=1e-6)
    assert cost(found, 72) == 0.02
    # Also where no width has the error of the dearest probe.
    few = channels([0.0, 1e-4, 0.02])
    found = WidthCosts(survey([few], [*PROBES[:2], Probe(0, "channels", 1.0, True, 0.02)]))
    assert cost(found, 2) == pytest.approx(0.08, rel=1e-6)


def test_each_axis_of_the_heads_has_its_curve():
    curves = [
        ErrorCurve(0, "heads", "kv_groups", (0.0, 0.2, 0.5), 1.0),
        ErrorCurve(0, "heads", "heads_per_group", (0.0, 0.3), 1.0),
    ]
    found = WidthCosts(survey(curves, [Probe(0, "heads", 1.0, True, 3.0)]))
    attention = block().modules[0]
    widths = {(3, 2): 0.0, (2, 2): 0.6, (1, 2): 1.5, (3, 1): 0.9, (0, 0): 3.0}
    for (groups, heads), wanted in widths.items():
        assert found.module_cost(0, attention, wide(groups, heads, 72)) == pytest.approx(wanted), (groups, heads)


def test_the_cost_of_a_plan_is_the_sum_over_modules():
    modules = [
        ErrorCurve(i, kind, kind_, (0.0, 0.1 * (i + 1)), 1.0)
        for i in range(2)
        for kind, kind_ in (("heads", "kv_groups"), ("channels", "channels"))
    ]  # type: ignore[arg-type]
    found = WidthCosts(survey(modules))
    widths = {0: wide(2, 2, 71), 1: wide(3, 2, 71)}
    assert found.total([block()] * 3, widths) == pytest.approx(0.1 + 0.1 + 0.2)
    assert found.total([block()] * 3, {}) == 0
    # What was not surveyed may stay dense, and nothing else.
    assert found.total([block()] * 3, {2: block().width}) == 0
    with pytest.raises(KeyError):
        found.total([block()] * 3, {2: wide(3, 2, 71)})


small = st.floats(0, 2, allow_subnormal=False)


@given(
    steps=st.lists(st.floats(-1e-7, 1), min_size=1, max_size=20),
    probes=st.lists(st.tuples(small, small), max_size=4),
    whole=small,
    energy=st.floats(1e-6, 10),
)
@settings(max_examples=150, deadline=None)
def test_removing_more_never_costs_less(steps, probes, whole, energy):
    curve = channels([0.0, *accumulate(steps)], energy)
    made = [Probe(0, "channels", error, False, divergence) for error, divergence in probes]
    found = WidthCosts(survey([curve], [*made, Probe(0, "channels", energy, True, whole)]))
    costs = [cost(found, gone) for gone in range(len(curve.errors))]
    assert costs[0] == 0
    assert all(0 <= one <= two < float("inf") for one, two in pairwise(costs))
    # No cost is beyond all that was measured.
    assert costs[-1] <= max(whole, *(d for _, d in probes), 1e-9) * (1 + 1e-9)
