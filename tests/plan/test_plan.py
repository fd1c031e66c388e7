"""Plans under one target: within it, the cheapest there is, and of widths that may be."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from conftest import CheckpointFolder
from models import ROWS
from secateur.base.errors import SecateurError
from secateur.base.progress import Silent
from secateur.criteria.registry import SCORED_KINDS
from secateur.formats.format import format_class
from secateur.model.axes import LEVELS, Axis, Width
from secateur.model.checkpoint import open_checkpoint
from secateur.model.stream import BlockStream
from secateur.model.structure import Block
from secateur.model.units.channels import CHANNELS
from secateur.plan.meters import byte_meter, meter_of, parameter_meter
from secateur.plan.plan import check_reachable, plan, uniform_plans
from secateur.plan.problem import TOLERANCE, Plan, PlanProblem
from secateur.plan.target import parse_target
from secateur.plan.widths import default_multiple, head_widths, module_widths
from secateur.survey.curves import ErrorCurve, Probe, Survey
from secateur.survey.width_costs import WidthCosts

Wishes = Callable[..., PlanProblem]


@pytest.fixture
def wishes(checkpoint_folder: CheckpointFolder) -> Wishes:
    """A wish over a row's model; a text for a goal is a target."""

    def make(goal: float | str, name: str = "llama", **more: Any) -> PlanProblem:
        stream = BlockStream(open_checkpoint(checkpoint_folder(name)))
        parameters = meter = parameter_meter(stream)
        wanted = parse_target(goal) if isinstance(goal, str) else goal
        if not isinstance(wanted, float):
            meter = meter_of(
                wanted,
                stream,
                dtype=torch.float32,
                output_bytes=lambda: byte_meter(stream, torch.float32),
                device=stream.device,
                watcher=Silent(),
            )
        chosen = more.pop("pruned_blocks", range(len(stream)))
        return PlanProblem(
            blocks=stream.blocks, pruned_blocks=chosen, parameters=parameters, target=wanted, meter=meter, **more
        )

    return make


def survey_of(blocks: list[Block], seed: int = 0) -> Survey:
    """Curves that rise at random, and a price for each whole module."""
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


def every_plan(wish: PlanProblem) -> list[dict[int, Width]]:
    """All combinations of what each module may be cut to."""
    options = []
    for index in wish.pruned_blocks:
        modules = wish.prunable_modules(index)
        each = [module_widths(wish.blocks[index], module, wish.multiple, wish.unsupported_reason) for module in modules]
        found = []
        for chosen in itertools.product(*each):
            width = wish.blocks[index].width
            for module, other in zip(modules, chosen, strict=True):
                width |= {name: other[name] for name in module.removed}
            found.append(width)
        options.append(found)
    return [dict(zip(wish.pruned_blocks, widths, strict=True)) for widths in itertools.product(*options)]


@pytest.mark.parametrize("goal", [0.05, 0.25, 0.5, 0.9, "params=70%", "kv=50%", "bytes=0.18MB"])
def test_adaptive_is_the_cheapest_of_all_plans(wishes: Wishes, goal: float | str) -> None:
    wish = wishes(goal, multiple=24)
    survey = survey_of(wish.blocks, seed=3)
    found = plan(wish, "adaptive", survey)
    prices, meter = WidthCosts(survey), wish.meter
    # Sums over modules, so that thousands of plans take no time.
    cost = {(i, w): prices.total(wish.blocks, {i: w}) for i in wish.pruned_blocks for w in _widths(wish, i)}
    size = {(i, w): meter.total({i: w}) - meter.dense for i in wish.pruned_blocks for w in _widths(wish, i)}
    within = [
        sum(cost[at] for at in one.items())
        for one in every_plan(wish)
        if meter.dense + sum(size[at] for at in one.items()) <= wish.budget + 1e-6
    ]
    assert meter.total(found.widths) <= wish.budget + 1e-6
    assert 10 < len(within) < 8000
    assert found.cost == pytest.approx(min(within), rel=1e-9)
    assert found.cost == pytest.approx(prices.total(wish.blocks, found.widths), rel=1e-9)


def _widths(wish: PlanProblem, index: int) -> set[Width]:
    return {one[index] for one in every_plan(replace(wish, pruned_blocks=range(index, index + 1)))}


def test_adaptive_says_what_it_is(wishes: Wishes) -> None:
    wish = wishes(0.4)
    found = plan(wish, "adaptive", survey_of(wish.blocks))
    removed = wish.parameters.dense - wish.parameters.total(found.widths)
    assert found.sparsity == pytest.approx(removed / sum(block.parameters for block in wish.blocks))
    assert 0.4 <= found.sparsity < 0.4 + TOLERANCE
    assert (found.requested_sparsity, found.note, found.units) == (0.4, None, {})
    assert not found.uniform


def test_widths_without_a_survey_are_even_and_on_target(wishes: Wishes) -> None:
    wish = wishes(0.4)
    found = plan(wish, "adaptive")
    assert found.cost is None
    assert 0.4 <= found.sparsity < 0.4 + TOLERANCE
    channels = [width.channels for width in found.widths.values()]
    assert max(channels) - min(channels) <= 2


def test_a_target_is_its_own_wish(wishes: Wishes) -> None:
    wish = wishes("params=70%")
    found = plan(wish, "adaptive", survey_of(wish.blocks))
    assert found.requested_sparsity == found.sparsity
    assert found.note is None


@pytest.mark.parametrize("multiple", [1, 7, 16, 72])
@pytest.mark.parametrize("widths", ["adaptive", "uniform"])
def test_channels_come_in_multiples(wishes: Wishes, widths: str, multiple: int) -> None:
    wish = wishes(0.2, multiple=multiple)
    found = plan(wish, widths, survey_of(wish.blocks))
    counts = {width.channels for width in found.widths.values()}
    assert all(count % multiple == 0 or count == 72 for count in counts)
    assert any(width != block.width for width, block in zip(found.widths.values(), wish.blocks, strict=True))


@pytest.mark.parametrize("channels", [1, 72, 255, 256, 257, 1536, 10_000])
@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_steps_of_wide_modules_are_coarse(channels: int, multiple: int) -> None:
    step = Axis("channels", channels, rounded=True).stride(multiple)
    assert step % multiple == 0
    assert channels / step <= LEVELS
    # No coarser than need be.
    assert step == multiple or channels / (step / 2) > LEVELS


def test_wide_modules_are_rounded_where_nobody_says() -> None:
    def multiples(wide: int, numbers: tuple[int, ...]) -> list[int]:
        axes = (Axis("channels", number, rounded=True, wide=wide) for number in numbers)
        return [default_multiple([axis]) for axis in axes]

    assert multiples(1024, (256, 1023, 1024)) == [1, 1, 32]
    assert multiples(256, (255, 256, 1024)) == [1, 32, 32]


def test_experts_that_stay_keep_channels(wishes: Wishes) -> None:
    block = wishes(0.2, "qwen2_moe").blocks[-1]
    found = module_widths(block, block.feed_forward, 1, lambda _: None, ("channels",))
    assert [width.experts for width in found] == [block.feed_forward.units] * len(found)
    assert found[-1].channels > 0
    assert len(found) > 1


@pytest.mark.parametrize("kinds", [("heads",), ("channels",)])
def test_other_modules_stay(wishes: Wishes, kinds: Any) -> None:
    wish = wishes(0.1, kinds=kinds)
    for width in plan(wish, "adaptive", survey_of(wish.blocks)).widths.values():
        if kinds == ("heads",):
            assert width.channels == 72
        else:
            assert (width.groups, width.per_group) == (3, 2)


@pytest.mark.parametrize("goal", [0.3, "params=95%"])
@pytest.mark.parametrize("widths", ["adaptive", "uniform"])
def test_blocks_outside_the_range_stay(wishes: Wishes, widths: str, goal: float | str) -> None:
    wish = wishes(goal, pruned_blocks=range(1, 2))
    found = plan(wish, widths, survey_of(wish.blocks))
    assert found.widths.keys() == {1}
    block = wish.blocks[1]
    removed = block.parameters - block.parameters_at(found.widths[1])
    assert removed == wish.parameters.dense - wish.parameters.total(found.widths)
    if goal == 0.3:
        assert found.sparsity == removed / block.parameters
        # One channel of one block is two thirds of a point.
        assert abs(found.sparsity - 0.3) <= 0.01


def test_what_the_format_cannot_hold_is_not_planned(wishes: Wishes) -> None:
    def held(width: Width) -> str | None:
        return "too narrow" if width.groups < 2 or not width.channels else None

    wish = wishes(0.5, unsupported_reason=held)
    for widths in ("adaptive", "uniform"):
        found = plan(wish, widths, survey_of(wish.blocks))
        assert all(held(width) is None for width in found.widths.values())
    free = plan(wishes(0.5), "adaptive", survey_of(wish.blocks))
    assert any(held(width) for width in free.widths.values())
    with pytest.raises(
        SecateurError, match=r"is out of reach: at most \d\d\.\d% of the blocks can be removed; too narrow"
    ):
        check_reachable(replace(wish, target=0.9))
    refused = replace(wish, unsupported_reason=lambda _: "nothing fits")
    for check in (check_reachable, uniform_plans):
        with pytest.raises(SecateurError, match="the format cannot hold any narrower width: nothing fits"):
            check(refused)


@pytest.mark.parametrize("name", ROWS)
def test_modules_go_as_a_whole_only_where_the_format_holds_that(checkpoint_folder: CheckpointFolder, name: str) -> None:
    stream = BlockStream(open_checkpoint(checkpoint_folder(name)))
    block = stream.blocks[0]
    for format in ("hf", "stock"):
        offered = {
            kind: module_widths(block, block.module(kind), 1, format_class(format)(stream).unsupported_reason)
            for kind in SCORED_KINDS
        }
        assert all(widths[0] == block.width for widths in offered.values())
        empty = [not offered["heads"][-1].heads, not offered["channels"][-1].channels]
        assert empty == [format == "hf"] * 2, format
        if block.attention.locked:
            # All or nothing.
            assert len(offered["heads"]) == (2 if format == "hf" else 1)
        elif format == "hf":
            assert len(offered["heads"]) == len(head_widths(block, SCORED_KINDS)) + 1
    assert all(width.heads for one in uniform_plans(_wish(stream)) for width in one.widths.values())


def _wish(stream: BlockStream) -> PlanProblem:
    meter = parameter_meter(stream)
    return PlanProblem(blocks=stream.blocks, pruned_blocks=range(3), parameters=meter, target=0.4, meter=meter)


# One width.


@pytest.mark.parametrize("share", [0.02, 0.1, 0.25, 0.5, 0.75])
def test_uniform_is_within_half_a_point(wishes: Wishes, share: float) -> None:
    wish = wishes(share)
    plans = uniform_plans(wish)
    gaps = [abs(one.sparsity - share) for one in plans]
    assert gaps == sorted(gaps)
    assert gaps[-1] <= TOLERANCE
    assert all(one.uniform and one.note is None and one.cost is None for one in plans)
    assert len({(one.widths[0].groups, one.widths[0].per_group) for one in plans}) == len(plans)
    for one in plans:
        # One channel more or less in every block comes no nearer.
        for step in (-1, 1):
            channels = one.widths[0].channels + step
            if not 1 <= channels <= 72:
                continue
            other = wish.sparsity(dict.fromkeys(range(3), one.widths[0] | {CHANNELS: channels}))
            assert abs(other - share) >= abs(one.sparsity - share) - 1e-12
    assert plan(wish, "uniform") == plans[0]


@pytest.mark.parametrize("goal", ["params=80%", "params=40K", "bytes=170kB", "kv=67%"])
def test_a_target_is_a_limit(wishes: Wishes, goal: str) -> None:
    wish = wishes(goal)
    plans = uniform_plans(wish)
    for one in plans:
        taken = wish.meter.total(one.widths)
        assert taken <= wish.budget
        wider = dict.fromkeys(range(3), one.widths[0] | {CHANNELS: one.widths[0].channels + 1})
        assert one.widths[0].channels == 72 or wish.meter.total(wider) > wish.budget
    assert wish.meter.total(plans[0].widths) == max(wish.meter.total(one.widths) for one in plans)


def test_a_plan_says_what_is_settled(wishes: Wishes) -> None:
    wish = wishes(0.2)
    dense = wish.blocks[0].width
    assert wish.plan(dict.fromkeys(range(3), dense)).uniform is True
    several = wish.plan({0: dense, 1: dense | {CHANNELS: 1}})
    assert several.uniform is False
    assert several.lists_units is False
    settled = {"heads": (0,), "channels": (1,)}
    assert replace(several, units={0: settled, 1: settled}).lists_units is True
    assert replace(several, units={0: settled, 1: {"heads": (0,)}}).lists_units is False


def test_the_split_that_costs_least(wishes: Wishes) -> None:
    wish = wishes(0.3)
    plans, places = uniform_plans(wish), set()
    for seed in range(8):
        survey = survey_of(wish.blocks, seed)
        costs = [WidthCosts(survey).total(wish.blocks, one.widths) for one in plans]
        places.add(costs.index(min(costs)))
        assert plan(wish, "uniform", survey) == replace(plans[costs.index(min(costs))], cost=min(costs))
    assert len(places) > 1


def test_a_lone_plan_has_its_price(wishes: Wishes) -> None:
    wish = wishes(0.2, kinds=("heads",))
    (alone,) = uniform_plans(wish)
    survey = survey_of(wish.blocks, 0)
    assert plan(wish, "uniform", survey).cost == WidthCosts(survey).total(wish.blocks, alone.widths) > 0


def test_the_nearest_where_none_is_near(wishes: Wishes) -> None:
    found = plan(wishes(0.2, kinds=("heads",)), "uniform")
    assert abs(found.sparsity - 0.2) > TOLERANCE
    assert found.note is not None
    assert f"sparsity is {found.sparsity:.1%} instead of 20.0%: this is the nearest among the widths" in found.note


def test_units_that_give_nothing_go_beyond_the_target(wishes: Wishes) -> None:
    wish = wishes(0.1)
    found = wish.plan({index: block.width | {CHANNELS: 9} for index, block in enumerate(wish.blocks)}, 0.0)
    assert (
        found.note == f"sparsity is {found.sparsity:.1%} instead of 10.0%: all removed units contribute next to nothing"
    )


# Out of reach.


@pytest.mark.parametrize("widths", ["adaptive", "uniform"])
@pytest.mark.parametrize(
    ("goal", "more", "message"),
    [
        (0.9999, {}, r"sparsity 100.0% is out of reach: at most \d\d\.\d% of the blocks can be removed"),
        (0.9, {"kinds": ("channels",)}, r"; only channels may be removed"),
        ("params=100", {}, r"target params=100 is out of reach: the smallest possible value is .*; request params=\d"),
        ("params=5%", {}, r"target params=5% is out of reach: .*; request params=\d\d(\.\d)?%, or allow more"),
        ("kv=90%", {"kinds": ("channels",)}, "the modules that may be pruned do not change this quantity"),
        ("params=1G", {}, "the dense model has no more than .*; request less"),
    ],
)
def test_out_of_reach(wishes: Wishes, widths: str, goal: float | str, more: dict[str, Any], message: str) -> None:
    wish = wishes(goal, **more)
    calls: list[Callable[[], Any]] = [lambda: plan(wish, widths, survey_of(wish.blocks))]
    if widths == "adaptive":
        calls.append(lambda: check_reachable(wish))
    if widths == "uniform" and goal == "kv=90%":
        message = "do not change this quantity|nothing can be removed"
    for call in calls:
        with pytest.raises(SecateurError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_the_nearest_that_is_named_can_be_had(wishes: Wishes) -> None:
    for goal in ("params=100", "params=5%", "bytes=1kB", "bytes=3%"):
        with pytest.raises(SecateurError) as caught:
            check_reachable(wishes(goal))
        named = str(caught.value).partition("request ")[2].partition(",")[0]
        wish = wishes(named)
        check_reachable(wish)
        found: Plan = plan(wish, "adaptive", survey_of(wish.blocks))
        assert wish.meter.total(found.widths) <= wish.budget
