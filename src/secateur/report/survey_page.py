"""A survey as one self-contained HTML page: what each module costs, and what a sparsity would remove.

`survey_page.html` beside this file draws; here is what it draws, rounded and thinned so that the page of a large model
stays small. Nothing is fetched when the page opens.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from secateur.model.axes import ATTENTION, Width
from secateur.model.structure import Block, PrunableModule
from secateur.model.units.channels import CHANNELS
from secateur.model.units.experts import EXPERTS
from secateur.model.units.heads import HEADS, HEADS_PER_GROUP, KV_GROUPS
from secateur.plan.problem import Plan
from secateur.survey.curves import ErrorCurve, Survey
from secateur.survey.width_costs import WidthCosts

TEMPLATE = Path(__file__).with_name("survey_page.html")
PLACE = "{{DATA}}"
"""Where the template takes the data."""
_LINES = {KV_GROUPS: "groups", HEADS_PER_GROUP: "heads", CHANNELS: "channels", EXPERTS: "channels"}
"""Lines of the page by axis; experts stand in the place of channels."""
POINTS = 100
"""Most points of a curve: more than a screen shows."""
UNITS = 80
"""Most units of a module that are listed one by one: half of them the first to leave, half the last."""

Distances = Mapping[int, Sequence[Sequence[float]]]
"""Block → the distance of each query head from each other one, in nats (h x h, symmetric)."""


def page_data(
    survey: Survey,
    blocks: Sequence[Block],
    plans: Mapping[float, Plan],
    *,
    facts: Mapping[str, Any],
    distances: Distances | None = None,
) -> dict[str, Any]:
    """What the page shows, as JSON.

    Args:
        survey: error curves and probes.
        blocks: every block of the dense model.
        plans: the wanted share → the widths that cost least.
        facts: `model`, its `family`, its `parameters` and the `line` that uses the survey.
        distances: of the query heads; without them the page does not compare heads.
    """
    prices = WidthCosts(survey)
    modules: dict[tuple[int, str], list[ErrorCurve]] = {}
    for curve in survey.curves:
        # Of a mixture the page shows experts; what channels of these cost is in the prices of plans.
        if curve.axis in (*HEADS, curve.kind):
            modules.setdefault((curve.block, curve.kind), []).append(curve)
    return {
        **facts,
        "criterion": survey.criterion,
        "ridge": survey.ridge,
        "tokens": survey.tokens,
        "probed": bool(survey.probes),
        # Experts stand in the place of channels; blocks without them are shown alike.
        "fed": "experts" if any(block.width.experts for block in blocks) else "channels",
        "blocks": [[block.width.groups, block.width.per_group, block.width.fed] for block in blocks],
        "modules": [_module(blocks[curves[0].block], curves, prices) for curves in modules.values()],
        "plans": [_plan(share, plan, blocks, prices) for share, plan in plans.items()],
        "distances": None if distances is None else {index: _triangle(rows) for index, rows in distances.items()},
    }


def render(data: Mapping[str, Any]) -> str:
    """The page, complete."""
    # A name may hold `</script>` or `<!--`; inside a JSON string the escapes say the same.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    page, fed = TEMPLATE.read_text(encoding="utf-8"), data.get("fed", "channels")
    for place, word in (("{{FED}}", fed.capitalize()), ("{{fed}}", fed), ("{{one}}", fed[:-1])):
        page = page.replace(place, word)
    return page.replace(PLACE, text)


def _module(block: Block, curves: Sequence[ErrorCurve], prices: WidthCosts) -> dict[str, Any]:
    """One module: its curves, and its units in the order in which they leave."""
    module = block.module(curves[0].kind)
    return {
        "block": curves[0].block,
        "kind": "heads" if module.role == ATTENTION else "channels",
        "units": module.units,
        "locked": module.locked,
        "curves": [_curve(block, module, curve, prices) for curve in curves],
        # The last pattern is the finest.
        "scores": _scores(block, module, curves[-1], prices),
    }


def _curve(block: Block, module: PrunableModule, curve: ErrorCurve, prices: WidthCosts) -> dict[str, Any]:
    """One curve: units left, share of the module's output that is lost, and price, from dense to nothing."""
    units = module.axis(curve.axis).units
    gone = [*_thinned(len(curve.errors)), units]
    lost = [_share(curve.errors[count], curve) for count in gone[:-1]]
    return {
        "pattern": _LINES[curve.axis],
        "left": [units - count for count in gone],
        "lost": [_short(value) for value in (*lost, 1.0)],
        "price": [_short(_price(block, module, curve, count, prices)) for count in gone],
    }


def _scores(block: Block, module: PrunableModule, curve: ErrorCurve, prices: WidthCosts) -> list[list[float]]:
    """(unit, turn, rise of the lost share, rise of the price) as units leave; the last ones go with the module."""
    together = module.enclosing_units(curve.axis)
    last = sorted(set(range(module.units)) - set(curve.order)) if curve.order else []
    turns = [(unit, place // together) for place, unit in enumerate(curve.order)]
    turns += [(unit, len(curve.errors) - 1) for unit in last]
    if len(turns) > UNITS:
        turns = turns[: UNITS // 2] + turns[-(UNITS // 2) :]
    ends = [*(_share(error, curve) for error in curve.errors), 1.0]

    def rise(turn: int) -> tuple[float, float]:
        before, after = (_price(block, module, curve, turn + step, prices) for step in (0, 1))
        return _short(max(ends[turn + 1] - ends[turn], 0.0)), _short(max(after - before, 0.0))

    return [[unit, turn + 1, *rise(turn)] for unit, turn in turns]


def _price(block: Block, module: PrunableModule, curve: ErrorCurve, gone: int, prices: WidthCosts) -> float:
    """Return the cost of a module that has lost so many units along the curve's axis, in nats per token."""
    # What never leaves alone goes with the module.
    left = module.axis(curve.axis).units - gone if gone < len(curve.errors) else 0
    return prices.module_cost(curve.block, module, _width(block.width, module, curve.axis, left))


def _width(dense: Width, module: PrunableModule, axis: str, left: int) -> Width:
    """Return the dense width cut along one axis of a module."""
    return dense | ({axis: left} if left else module.removed)


def _plan(share: float, plan: Plan, blocks: Sequence[Block], prices: WidthCosts) -> dict[str, Any]:
    """What one share would remove, block by block."""
    widths = [plan.widths.get(index, block.width) for index, block in enumerate(blocks)]
    kept = [block.parameters_at(width) for block, width in zip(blocks, widths, strict=True)]
    removed = sum(block.parameters for block in blocks) - sum(kept)
    return {
        "share": share,
        "reached": _short(plan.sparsity),
        "removed": removed,
        "price": _short(plan.cost or 0.0),
        "note": "; ".join(filter(None, (plan.note, _drawn(widths, blocks)))) or None,
        "widths": [
            [width.groups, width.per_group, _fed(width, block)] for width, block in zip(widths, blocks, strict=True)
        ],
        "goes": [_short(1 - now / block.parameters) for now, block in zip(kept, blocks, strict=True)],
        "prices": [
            _short(prices.total(blocks, {index: width})) if index in plan.widths else 0.0
            for index, width in enumerate(widths)
        ],
    }


def _fed(width: Width, block: Block) -> float:
    """Channels, or experts; where channels of these go, the experts that hold as many as are left."""
    if not width.experts or width.channels == block.width.channels:
        return width.fed
    return _short(width.experts * width.channels / block.width.channels)


def _drawn(widths: Sequence[Width], blocks: Sequence[Block]) -> str | None:
    """A note where experts stand for their channels."""
    if all(
        width.channels == block.width.channels for width, block in zip(widths, blocks, strict=True) if width.experts
    ):
        return None
    return "channels of experts that go are shown as the experts that would hold them"


def _share(error: float, curve: ErrorCurve) -> float:
    """Of the module's output energy, what a width loses beyond the dense width's own rounding."""
    return max(error - curve.errors[0], 0.0) / curve.energy if curve.energy > 0 else 0.0


def _thinned(count: int) -> list[int]:
    """At most `POINTS` of 0 ... count - 1, both ends among them."""
    return np.unique(np.linspace(0, count - 1, min(count, POINTS)).round().astype(int)).tolist()


def _triangle(rows: Sequence[Sequence[float]]) -> list[float]:
    """What stands above the diagonal, row by row."""
    return [round(float(value), 4) for index, row in enumerate(rows) for value in row[index + 1 :]]


def _short(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")
