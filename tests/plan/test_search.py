"""The search for the smallest model within a perplexity limit, with artificial losses."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from conftest import CheckpointFolder
from secateur import BlockStream, SecateurError, open_checkpoint
from secateur.model.units.channels import CHANNELS
from secateur.model.units.heads import KV_GROUPS
from secateur.plan.meters import parameter_meter
from secateur.plan.problem import Plan, PlanProblem
from secateur.plan.search import ATTEMPTS, CLOSE_ENOUGH, MAX_ATTEMPTS, smallest_within
from secateur.survey.curves import ErrorCurve, Probe, Survey


@pytest.fixture
def problem(checkpoint_folder: CheckpointFolder) -> PlanProblem:
    stream = BlockStream(open_checkpoint(checkpoint_folder("llama")))
    meter = parameter_meter(stream)
    return PlanProblem(blocks=stream.blocks, pruned_blocks=range(3), parameters=meter, target=0.0, meter=meter)


UNITS = {"kv_groups": 3, "heads_per_group": 2, "channels": 72}


def curve(index: int, axis: str, units: int) -> ErrorCurve:
    share = [gone / units for gone in range(units)]
    kind = "channels" if axis == "channels" else "heads"
    return ErrorCurve(index, kind, axis, tuple((index + 1) * s**1.5 for s in share), index + 1.0)


SURVEY = Survey(
    "l1",
    0.3,
    64,
    tuple(
        curve(i, axis, n) for i in range(3) for axis, n in (("kv_groups", 3), ("heads_per_group", 2), ("channels", 72))
    ),  # type: ignore[arg-type]
    tuple(Probe(i, kind, i + 1.0, True, 0.4 * (i + 1)) for i in range(3) for kind in ("heads", "channels")),  # type: ignore[arg-type]
)


class Loss:
    """Perplexity ratio as a function of the cost by the survey; records all plans that it is asked for."""

    def __init__(self, of: Callable[[float], float]):
        self.of, self.seen = of, list[Plan]()

    def __call__(self, plan: Plan) -> float:
        self.seen.append(plan)
        assert plan.cost is not None
        return self.of(plan.cost)


TRUE: dict[str, Callable[[float], float]] = {
    "as expected": lambda price: math.exp(price),
    "half of it": lambda price: math.exp(0.5 * price),
    "a fifth of it": lambda price: math.exp(0.2 * price),
    "three times": lambda price: math.exp(3 * price),
    "slow, then fast": lambda price: math.exp(2 * price**1.5),
    "better than dense at first": lambda price: math.exp(0.5 * (price - 0.1)),
}


@pytest.mark.parametrize("ratio", [1.1, 1.5, 2.0])
@pytest.mark.parametrize("case", TRUE)
def test_the_search_approaches_the_ratio_from_below(problem, case, ratio):
    loss = Loss(TRUE[case])
    found = smallest_within(problem, "adaptive", SURVEY, ratio, loss)
    assert len(loss.seen) <= ATTEMPTS
    assert found in loss.seen
    got = math.log(loss(found)) / math.log(ratio)
    assert got <= 1
    # One channel more or less is a step of this size.
    assert got > CLOSE_ENOUGH - 0.05
    within = [plan for plan in loss.seen if loss.of(plan.cost or 0.0) <= ratio]
    assert found.sparsity == max(plan.sparsity for plan in within)


def test_the_search_can_use_uniform_widths(problem):
    loss = Loss(TRUE["half of it"])
    found = smallest_within(problem, "uniform", SURVEY, 1.5, loss)
    assert found.uniform
    assert loss(found) <= 1.5
    assert found.sparsity > 0.05


def test_the_search_respects_blocks_kinds_and_rounding(problem):
    part = replace(problem, pruned_blocks=range(1, 2), kinds=("channels",), multiple=8)
    found = smallest_within(part, "adaptive", SURVEY, 1.3, Loss(TRUE["as expected"]))
    assert found.widths.keys() == {1}
    assert (found.widths[1][KV_GROUPS], found.widths[1][CHANNELS] % 8) == (3, 0)


def test_the_smallest_cut_is_tried_if_all_are_too_expensive(problem):
    dear = tuple(replace(one, divergence=1e6 * one.divergence) for one in SURVEY.probes)
    loss = Loss(lambda _: 1.1)
    found = smallest_within(problem, "adaptive", replace(SURVEY, probes=dear), 1.2, loss)
    assert 0 < loss.seen[0].sparsity < 0.01
    assert found.sparsity < 0.2


def test_a_ratio_that_no_plan_reaches_is_an_error(problem):
    loss = Loss(lambda price: 4 + price)
    with pytest.raises(SecateurError, match=r"target ppl=1.2x: the best .* has 4\.\d+x the dense .*; allow more than"):
        smallest_within(problem, "adaptive", SURVEY, 1.2, loss)
    assert 1 <= len(loss.seen) <= MAX_ATTEMPTS


def test_the_search_ends_with_the_smallest_model_if_nothing_is_lost(problem):
    found = smallest_within(problem, "adaptive", SURVEY, 1.2, Loss(lambda _: 0.9))
    assert found.sparsity > 0.9
