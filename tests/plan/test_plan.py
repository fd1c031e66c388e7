"""Plans reach their target, have the lowest cost, and use possible widths only; the search for a perplexity."""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from conftest import CheckpointFolder
from models import ROWS
from outputs import assert_error, error_of
from secateur import BlockStream, SecateurError, open_checkpoint
from secateur.base.progress import Silent
from secateur.criteria.registry import SCORED_KINDS
from secateur.formats.format import format_class
from secateur.model.axes import Axis, Width
from secateur.model.structure import Block
from secateur.model.units.channels import CHANNELS
from secateur.model.units.experts import EXPERT_CHANNELS, EXPERTS
from secateur.model.units.heads import HEADS, HEADS_PER_GROUP, KV_GROUPS
from secateur.plan.meters import byte_meter, cache_meter, meter_of, parameter_meter
from secateur.plan.plan import plan
from secateur.plan.problem import TOLERANCE, Plan, PlanProblem
from secateur.plan.reach import check_near, check_reachable
from secateur.plan.search import ATTEMPTS, CLOSE_ENOUGH, MAX_ATTEMPTS, smallest_within
from secateur.plan.target import parse_target
from secateur.plan.uniform import uniform_plans
from secateur.plan.widths import default_multiple, head_widths, module_widths
from secateur.survey.curves import ErrorCurve, Probe, Survey
from secateur.survey.width_costs import WidthCosts

MakeProblem = Callable[..., PlanProblem]


@pytest.fixture
def make_problem(checkpoint_folder: CheckpointFolder) -> MakeProblem:
    """Return a function that makes a problem for a model, from a sparsity or the text of a target."""

    def make(target: float | str, name: str = "llama", **more: Any) -> PlanProblem:
        stream = BlockStream(open_checkpoint(checkpoint_folder(name)))
        parameters = meter = parameter_meter(stream)
        wanted = parse_target(target) if isinstance(target, str) else target
        if isinstance(target, str):
            sizes = {"bytes": byte_meter, "kv": cache_meter}
            of_output = {name: partial(meter, stream, torch.float32) for name, meter in sizes.items()}
            meter = meter_of(wanted, stream, of_output, torch.float32, Silent())
        rest = {"pruned_blocks": range(len(stream)), "parameters": parameters, "target": wanted, "meter": meter}
        return PlanProblem(blocks=stream.blocks, **rest | more)

    return make


def survey_of(blocks: list[Block], seed: int = 0) -> Survey:
    """Return a survey with curves that rise at random, and two probes for each module."""
    dice = random.Random(seed)
    curves, probes = list[ErrorCurve](), list[Probe]()
    for index, block in enumerate(blocks):
        for kind in SCORED_KINDS:
            module, energy = block.module(kind), dice.uniform(0.5, 2)
            for axis in [one.name for one in module.cut_axes]:
                steps = [0.0] + [dice.random() ** 3 for _ in range(module.axis(axis).units)]
                total = list(itertools.accumulate(steps))
                errors = tuple(energy * value / total[-1] for value in total[:-1])
                curves.append(ErrorCurve(index, kind, axis, errors, energy))
            probes.append(Probe(index, kind, energy / 4, False, dice.uniform(0, 0.3)))
            probes.append(Probe(index, kind, energy, True, dice.uniform(0.2, 2)))
    return Survey("l1", 0.3, 64, tuple(curves), tuple(probes))


def block_widths(problem: PlanProblem, index: int) -> list[Width]:
    """Return all combinations of the widths of a block's modules."""
    block, modules = problem.blocks[index], problem.prunable_modules(index)
    each = [module_widths(block, module, problem.multiple, problem.unsupported_reason) for module in modules]
    found = []
    for chosen in itertools.product(*each):
        width = block.width
        for module, other in zip(modules, chosen, strict=True):
            width |= {name: other[name] for name in module.removed}
        found.append(width)
    return found


@pytest.mark.parametrize("target", [0.05, 0.25, 0.5, 0.9, "params=70%", "kv=50%", "bytes=0.18MB"])
def test_adaptive_is_the_cheapest_of_all_plans(make_problem, target):
    problem = make_problem(target, multiple=24)
    survey = survey_of(problem.blocks, seed=3)
    found = plan(problem, "adaptive", survey)
    width_costs, meter = WidthCosts(survey), problem.meter
    # Costs and sizes are sums over blocks; one entry a plan.
    costs, sizes = np.zeros(1), np.full(1, meter.dense)
    for index in problem.pruned_blocks:
        widths = block_widths(problem, index)
        costs = np.add.outer(costs, [width_costs.total(problem.blocks, {index: width}) for width in widths]).ravel()
        sizes = np.add.outer(sizes, [meter.total({index: width}) - meter.dense for width in widths]).ravel()
    limit = problem.budget + 1e-6
    fits, size = sizes <= limit, meter.total(found.widths)
    if problem.slack and sizes[np.argmin(np.where(fits, costs, np.inf))] < problem.budget - problem.slack:
        # All plans on target; or else the nearest.
        away = np.maximum(np.abs(sizes - problem.budget) - problem.slack, 0.0)
        fits, limit = away <= away.min() + 1e-6, problem.budget + problem.slack + away.min() + 1e-6
    within = costs[fits]
    assert size <= limit
    assert 0 < len(within) < 8000
    assert found.cost == pytest.approx(within.min(), rel=1e-9)
    assert found.cost == pytest.approx(width_costs.total(problem.blocks, found.widths), rel=1e-9)


def test_an_adaptive_plan_has_the_requested_sparsity(make_problem):
    problem = make_problem(0.4)
    found = plan(problem, "adaptive", survey_of(problem.blocks))
    removed = problem.parameters.dense - problem.parameters.total(found.widths)
    assert found.sparsity == pytest.approx(removed / sum(block.parameters for block in problem.blocks))
    assert 0.4 <= found.sparsity < 0.4 + TOLERANCE
    assert (found.requested_sparsity, found.note, found.units) == (0.4, None, {})
    assert not found.uniform
    # A target requests no sparsity.
    found = plan(make_problem("params=70%"), "adaptive", survey_of(problem.blocks))
    assert (found.requested_sparsity, found.note) == (found.sparsity, None)


def test_widths_without_a_survey_are_even_and_on_target(make_problem):
    problem = make_problem(0.4)
    found = plan(problem, "adaptive")
    assert found.cost is None
    assert 0.4 <= found.sparsity < 0.4 + TOLERANCE
    channels = [width[CHANNELS] for width in found.widths.values()]
    assert max(channels) - min(channels) <= 2


@pytest.mark.parametrize("multiple", [1, 7, 16, 72])
@pytest.mark.parametrize("widths", ["adaptive", "uniform"])
def test_channels_are_rounded_to_the_multiple(make_problem, widths, multiple):
    problem = make_problem(0.2, multiple=multiple)
    found = plan(problem, widths, survey_of(problem.blocks))
    counts = {width[CHANNELS] for width in found.widths.values()}
    assert all(count % multiple == 0 or count == 72 for count in counts)
    assert any(width != block.width for width, block in zip(found.widths.values(), problem.blocks, strict=True))


def test_wide_modules_are_rounded_to_32_by_default():
    def multiples(rounds_from: int, numbers: tuple[int, ...]) -> list[int]:
        axes = (Axis("channels", number, rounded=True, rounds_from=rounds_from) for number in numbers)
        return [default_multiple([axis]) for axis in axes]

    assert multiples(1024, (256, 1023, 1024)) == [1, 1, 32]
    assert multiples(256, (255, 256, 1024)) == [1, 32, 32]


def test_channels_fill_the_blocks_of_the_format_by_default():
    def multiples(*numbers: int) -> int:
        axes = [Axis("channels", number, rounded=True, rounds_from=1024) for number in numbers]
        return default_multiple([*axes, Axis("heads", 9)], 256)

    assert multiples(2048, 1024) == 256
    assert multiples(2048, 2016) == 32
    assert multiples(2048, 512) == 1


def test_experts_keep_at_least_some_channels(make_problem):
    block = make_problem(0.2, "qwen2_moe").blocks[-1]
    found = module_widths(block, block.modules[-1], 1, lambda _: None, ("channels",))
    assert [width[EXPERTS] for width in found] == [block.modules[-1].units] * len(found)
    assert found[-1][EXPERT_CHANNELS] > 0
    assert len(found) > 1


@pytest.mark.parametrize("target", [0.3, "params=95%"])
@pytest.mark.parametrize("widths", ["adaptive", "uniform"])
def test_blocks_outside_the_range_stay_dense(make_problem, widths, target):
    problem = make_problem(target, pruned_blocks=range(1, 2))
    found, block = plan(problem, widths, survey_of(problem.blocks)), problem.blocks[1]
    assert found.widths.keys() == {1}
    removed = block.parameters - block.parameters_at(found.widths[1])
    assert removed == problem.parameters.dense - problem.parameters.total(found.widths)
    if target == 0.3:
        assert found.sparsity == removed / block.parameters
        # One channel of one block is two thirds of a point.
        assert abs(found.sparsity - 0.3) <= 0.01


def test_no_plan_has_a_width_that_the_format_cannot_hold(make_problem):
    def held(width: Width) -> str | None:
        return "too narrow" if width[KV_GROUPS] < 2 or not width[CHANNELS] else None

    problem = make_problem(0.5, unsupported_reason=held)
    for widths in ("adaptive", "uniform"):
        found = plan(problem, widths, survey_of(problem.blocks))
        assert all(held(width) is None for width in found.widths.values())
    free = plan(make_problem(0.5), "adaptive", survey_of(problem.blocks))
    assert any(held(width) for width in free.widths.values())
    with pytest.raises(SecateurError, match=r"is out of reach: at most \d\d\.\d% .* can be removed; too narrow"):
        check_reachable(replace(problem, target=0.9))
    refused = replace(problem, unsupported_reason=lambda _: "nothing fits")
    for check in (check_reachable, uniform_plans):
        assert_error("the format cannot hold any narrower width: nothing fits", check, refused)


@pytest.mark.parametrize("name", ROWS)
def test_whole_modules_are_removed_only_if_the_format_can_hold_that(make_problem, checkpoint_folder, name):
    stream = BlockStream(open_checkpoint(checkpoint_folder(name)))
    block = stream.blocks[0]
    for format in ("hf", "stock"):
        reason = format_class(format)(stream).unsupported_reason
        heads, channels = (module_widths(block, block.module(kind), 1, reason) for kind in SCORED_KINDS)
        assert heads[0] == channels[0] == block.width
        assert [not heads[-1].product(HEADS), not channels[-1][CHANNELS]] == [format == "hf"] * 2, format
        if block.heads_locked:
            # All or nothing.
            assert len(heads) == (2 if format == "hf" else 1)
        elif format == "hf":
            assert len(heads) == len(head_widths(block, SCORED_KINDS)) + 1
    assert all(width.product(HEADS) for one in uniform_plans(make_problem(0.4, name)) for width in one.widths.values())


# One width.


@pytest.mark.parametrize("share", [0.02, 0.1, 0.25, 0.5, 0.75])
def test_a_uniform_plan_is_within_half_a_percentage_point(make_problem, share):
    problem = make_problem(share)
    plans = uniform_plans(problem)
    gaps = [abs(one.sparsity - share) for one in plans]
    assert gaps == sorted(gaps)
    assert gaps[-1] <= TOLERANCE
    assert all(one.uniform and one.note is None and one.cost is None for one in plans)
    assert len({(one.widths[0][KV_GROUPS], one.widths[0][HEADS_PER_GROUP]) for one in plans}) == len(plans)
    for one, gap in zip(plans, gaps, strict=True):
        # One channel more or less in every block comes no nearer.
        for channels in {one.widths[0][CHANNELS] - 1, one.widths[0][CHANNELS] + 1} & {*range(1, 73)}:
            other = problem.sparsity(dict.fromkeys(range(3), one.widths[0] | {CHANNELS: channels}))
            assert abs(other - share) >= gap - 1e-12
    assert plan(problem, "uniform") == plans[0]


@pytest.mark.parametrize("target", ["params=80%", "params=40K", "bytes=170kB", "kv=67%"])
def test_a_target_is_an_upper_bound(make_problem, target):
    problem = make_problem(target)
    plans = uniform_plans(problem)
    for one in plans:
        assert problem.meter.total(one.widths) <= problem.budget
        wider = dict.fromkeys(range(3), one.widths[0] | {CHANNELS: one.widths[0][CHANNELS] + 1})
        assert one.widths[0][CHANNELS] == 72 or problem.meter.total(wider) > problem.budget
    assert problem.meter.total(plans[0].widths) == max(problem.meter.total(one.widths) for one in plans)


def test_the_cheapest_uniform_plan_is_chosen(make_problem):
    problem = make_problem(0.3)
    plans, places = uniform_plans(problem), set()
    for seed in range(8):
        survey = survey_of(problem.blocks, seed)
        costs = [WidthCosts(survey).total(problem.blocks, one.widths) for one in plans]
        places.add(costs.index(min(costs)))
        assert plan(problem, "uniform", survey) == replace(plans[costs.index(min(costs))], cost=min(costs))
    assert len(places) > 1
    # The only plan has its cost as well.
    problem = make_problem(0.2, kinds=("heads",))
    (alone,) = uniform_plans(problem)
    assert plan(problem, "uniform", survey).cost == WidthCosts(survey).total(problem.blocks, alone.widths) > 0


def test_a_plan_far_from_the_target_has_a_note(make_problem):
    found = plan(make_problem(0.2, kinds=("heads",)), "uniform")
    assert abs(found.sparsity - 0.2) > TOLERANCE
    assert f"{found.sparsity:.1%} instead of 20.0%: among the widths" in (found.note or "")
    assert "--round allow, this is the nearest" in (found.note or "")


def test_a_plan_very_far_from_the_target_is_an_error():
    assert_error("nearest remove 81.5%; ask for --sparsity 0.815, or", check_near, Plan({}, 0.815, 0.3))


def test_units_that_cost_nothing_are_not_removed_beyond_the_target(make_problem):
    problem = make_problem(0.3)
    survey = survey_of(problem.blocks)
    free = replace(survey, curves=tuple(replace(one, errors=(0.0,) * len(one.errors)) for one in survey.curves))
    found = plan(problem, "adaptive", free)
    assert abs(found.sparsity - 0.3) <= TOLERANCE


# Out of reach.


@pytest.mark.parametrize("widths", ["adaptive", "uniform"])
def test_a_sparsity_is_reachable_within_half_a_percentage_point(make_problem, widths):
    problem = make_problem(0.25, kinds=("channels",))
    narrowest = {index: width | {CHANNELS: 1} for index, width in problem.dense_widths.items()}
    most = problem.sparsity(narrowest)
    problem = replace(problem, target=most + 0.004, unsupported_reason=lambda width: None if width.channels else "gone")
    for survey in (None, survey_of(problem.blocks)):
        found = plan(problem, widths, survey)
        assert (found.widths, found.note) == (narrowest, None)
    check_reachable(problem)
    beyond = replace(problem, target=most + 0.006)
    assert "is out of reach: at most" in error_of(plan, beyond, widths)
    assert "is out of reach: at most" in error_of(check_reachable, beyond)


def test_the_nearest_target_in_an_error_is_reachable(make_problem):
    for target in ("params=100", "params=5%", "bytes=1kB", "bytes=3%"):
        named = error_of(check_reachable, make_problem(target)).partition("request ")[2].partition(",")[0]
        problem = make_problem(named)
        check_reachable(problem)
        found: Plan = plan(problem, "adaptive", survey_of(problem.blocks))
        assert problem.meter.total(found.widths) <= problem.budget


def test_a_mixture_that_needs_all_experts_has_none_to_remove(make_problem):
    problem = make_problem(0.2, "mixtral", kinds=("experts",))
    problem = replace(problem, blocks=[_with_experts_needed(block) for block in problem.blocks])
    assert_error("nothing can be removed: the model needs all of its 6 experts", check_reachable, problem)


def _with_experts_needed(block: Block) -> Block:
    """Return a block whose experts are all locked, as if each token went to all of them."""
    module = block.modules[-1]
    axes = tuple(replace(axis, min_units=axis.units) if axis.kind == "experts" else axis for axis in module.axes)
    return replace(block, modules=(*block.modules[:-1], replace(module, axes=axes)))


@pytest.fixture
def problem(make_problem: MakeProblem) -> PlanProblem:
    return make_problem(0.0)


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
    "as expected": lambda cost: math.exp(cost),
    "half of it": lambda cost: math.exp(0.5 * cost),
    "a fifth of it": lambda cost: math.exp(0.2 * cost),
    "three times": lambda cost: math.exp(3 * cost),
    "slow, then fast": lambda cost: math.exp(2 * cost**1.5),
    "better than dense at first": lambda cost: math.exp(0.5 * (cost - 0.1)),
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


def test_the_smallest_cut_is_tried_if_all_are_too_expensive(problem):
    expensive = tuple(replace(one, divergence=1e6 * one.divergence) for one in SURVEY.probes)
    loss = Loss(lambda _: 1.1)
    found = smallest_within(problem, "adaptive", replace(SURVEY, probes=expensive), 1.2, loss)
    assert 0 < loss.seen[0].sparsity < 0.01
    assert found.sparsity < 0.2


def test_a_ratio_that_no_plan_reaches_is_an_error(problem):
    loss = Loss(lambda cost: 4 + cost)
    with pytest.raises(SecateurError, match=r"target ppl=1.2x: the best .* has 4\.\d+x the dense .*; allow more than"):
        smallest_within(problem, "adaptive", SURVEY, 1.2, loss)
    assert 1 <= len(loss.seen) <= MAX_ATTEMPTS


def test_the_search_ends_with_the_smallest_model_if_nothing_is_lost(problem):
    assert smallest_within(problem, "adaptive", SURVEY, 1.2, Loss(lambda _: 0.9)).sparsity > 0.9
