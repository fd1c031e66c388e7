"""A survey as one self-contained HTML page: the cost of every width, and what a given sparsity removes.

This file makes the data, rounded and thinned so that the page of a large model stays small; `survey_page.html` draws
them. The page loads nothing when it opens, and knows axes only from its data.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from secateur.model.axes import AxisKind, Width, axis_kinds, present
from secateur.model.structure import Block, PrunableModule
from secateur.plan.problem import Plan
from secateur.report.template import fill
from secateur.survey.curves import ErrorCurve, Survey
from secateur.survey.width_costs import WidthCosts

POINTS = 100
"""Largest number of points of a curve: more than a screen shows."""
UNITS = 80
"""Largest number of units of a module that are listed: half of them are the first to be removed, half the last."""

Distances = Mapping[int, Sequence[Sequence[float]]]
"""Distances between the query heads of each block, in nats (heads x heads, symmetric)."""


def page_data(
    survey: Survey,
    blocks: Sequence[Block],
    plans: Mapping[float, Plan],
    *,
    facts: Mapping[str, Any],
    distances: Distances | None = None,
    sizes: Mapping[float, Mapping[str, str]] | None = None,
) -> dict[str, Any]:
    """Return the data of the page as JSON values.

    Args:
        survey: Error curves and probes.
        blocks: All blocks of the dense model.
        plans: The cheapest plan for each sparsity.
        facts: `model`, its `family`, its number of `parameters`, the number of `probe_tokens` on which
            costs were measured, the command `line` that uses the survey, a sentence about the `vocabulary`, or None
            if all tokens are kept, and the smallest share that is `unreached`, or None.
        distances: Distances between query heads; without them the page does not compare heads.
        sizes: Further sizes of the model after each plan, as text with a unit, by name.
    """
    costs = WidthCosts(survey)
    axes = present([block.width for block in blocks])
    curves: dict[tuple[int, str], list[ErrorCurve]] = {}
    for curve in survey.curves:
        curves.setdefault((curve.block, curve.kind), []).append(curve)
    modules = {blocks[block].module(kind).kind: blocks[block].module(kind) for block, kind in curves}
    return {
        **facts,
        "criterion": survey.criterion,
        "ridge": survey.ridge,
        "tokens": survey.tokens,
        "probed": bool(survey.probes),
        "axes": [_axis(kind) for kind in axes],
        "kinds": {kind: {"label": _unit_axis(module).total, "role": module.role} for kind, module in modules.items()},
        "blocks": [_numbers(block.width, axes) for block in blocks],
        "modules": [_module(blocks[block], block, kind, found, costs) for (block, kind), found in curves.items()],
        "plans": [
            _plan(share, plan, blocks, axes, costs) | {"sizes": dict((sizes or {}).get(share, {}))}
            for share, plan in plans.items()
        ],
        "distances": None if distances is None else {index: _triangle(rows) for index, rows in distances.items()},
    }


def render(data: Mapping[str, Any]) -> str:
    """Return the complete page."""
    return fill("survey_page.html", data=data)


def _axis(kind: AxisKind) -> dict[str, Any]:
    """Return the name of an axis, the words for it and the axes that enclose it."""
    return {
        "name": kind.name,
        "role": kind.role,
        "label": kind.label,
        "total": kind.total,
        "outer": list(kind.outer),
    }


def _numbers(width: Width, axes: Sequence[AxisKind]) -> list[int | None]:
    """Return the number of units along each axis, None if the block has no such axis."""
    return [width.get(kind.name) for kind in axes]


def _unit_axis(module: PrunableModule) -> AxisKind:
    """Return the axis along which the units of a module lie: query heads, channels or experts."""
    width = {axis.name: axis.units for axis in module.axes}
    return next(
        kind for axis in reversed(module.axes) if (kind := axis_kinds()[axis.name]).count(width) == module.units
    )


def _module(block: Block, index: int, kind: str, curves: Sequence[ErrorCurve], costs: WidthCosts) -> dict[str, Any]:
    """Return the curves of one module, and its units in the order of removal."""
    module = block.module(kind)
    listed = [curve for curve in curves if axis_kinds()[curve.axis].count(block.width) == module.units]
    return {
        "block": index,
        "kind": kind,
        "units": module.units,
        "locked": module.locked,
        "curves": [_curve(block, module, curve, costs) for curve in curves],
        "scores": _scores(block, module, listed[-1], costs) if listed else [],
    }


def _curve(block: Block, module: PrunableModule, curve: ErrorCurve, costs: WidthCosts) -> dict[str, Any]:
    """Return numbers of units left, shares of the module's output lost, and costs, from dense to the module removed."""
    units = module.axis(curve.axis).units
    removed = [*_thinned(len(curve.errors)), units]
    lost = [_share(curve.errors[count], curve) for count in removed[:-1]]
    return {
        "axis": curve.axis,
        "left": [units - count for count in removed],
        "lost": [_rounded(value) for value in (*lost, 1.0)],
        "cost": [_rounded(_cost(block, module, curve, count, costs)) for count in removed],
    }


def _scores(block: Block, module: PrunableModule, curve: ErrorCurve, costs: WidthCosts) -> list[list[float]]:
    """Return (unit, turn, rise of the output lost, rise of the cost) of each unit in the order of removal.

    Units of several groups that are removed together share a turn. Units that are never removed alone come last, in
    the turn that removes the module.
    """
    together = module.enclosing_units(curve.axis)
    last = sorted(set(range(module.units)) - set(curve.order)) if curve.order else []
    turns = [(unit, place // together) for place, unit in enumerate(curve.order)]
    turns += [(unit, len(curve.errors) - 1) for unit in last]
    if len(turns) > UNITS:
        turns = turns[: UNITS // 2] + turns[-(UNITS // 2) :]
    lost = [*(_share(error, curve) for error in curve.errors), 1.0]

    def rise(turn: int) -> tuple[float, float]:
        before, after = (_cost(block, module, curve, turn + step, costs) for step in (0, 1))
        return _rounded(max(lost[turn + 1] - lost[turn], 0.0)), _rounded(max(after - before, 0.0))

    return [[unit, turn + 1, *rise(turn)] for unit, turn in turns]


def _cost(block: Block, module: PrunableModule, curve: ErrorCurve, removed: int, costs: WidthCosts) -> float:
    """Return the cost of a module without a number of units along the curve's axis, in nats per token.

    Beyond the end of the curve the whole module is removed.
    """
    left = module.axis(curve.axis).units - removed if removed < len(curve.errors) else 0
    return costs.module_cost(curve.block, module, block.width | ({curve.axis: left} if left else module.removed))


def _plan(
    share: float, plan: Plan, blocks: Sequence[Block], axes: Sequence[AxisKind], costs: WidthCosts
) -> dict[str, Any]:
    """Return what the plan for one sparsity removes from each block."""
    widths = [plan.widths.get(index, block.width) for index, block in enumerate(blocks)]
    kept = [block.parameters_at(width) for block, width in zip(blocks, widths, strict=True)]
    return {
        "share": share,
        "reached": _rounded(plan.sparsity),
        "removed": sum(block.parameters for block in blocks) - sum(kept),
        "cost": _rounded(plan.cost or 0.0),
        "note": plan.note,
        "widths": [_numbers(width, axes) for width in widths],
        "shares": [_rounded(1 - now / block.parameters) for now, block in zip(kept, blocks, strict=True)],
        "costs": [
            _rounded(costs.total(blocks, {index: width})) if index in plan.widths else 0.0
            for index, width in enumerate(widths)
        ],
    }


def _share(error: float, curve: ErrorCurve) -> float:
    """Return the share of the module's output energy that an error adds to the rounding error of the dense width."""
    return max(error - curve.errors[0], 0.0) / curve.energy if curve.energy > 0 else 0.0


def _thinned(count: int) -> list[int]:
    """Return at most `POINTS` of the numbers from 0 to count - 1, both ends among them."""
    return np.unique(np.linspace(0, count - 1, min(count, POINTS)).round().astype(int)).tolist()


def _triangle(rows: Sequence[Sequence[float]]) -> list[float]:
    """Return the entries above the diagonal, row by row."""
    return [round(float(value), 4) for index, row in enumerate(rows) for value in row[index + 1 :]]


def _rounded(value: float) -> float:
    """Return a number rounded to four significant digits."""
    return float(f"{value:.4g}")
