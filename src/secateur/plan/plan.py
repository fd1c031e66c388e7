"""Plans: the widths with the lowest cost that reach a target, found before any weight is changed."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from secateur.base.errors import SecateurError
from secateur.base.words import joined
from secateur.plan.allocation import adaptive_widths, search_uniform_widths, smallest_size
from secateur.plan.meters import unreachable_error
from secateur.plan.problem import LARGEST_MISS, TOLERANCE, Plan, PlanProblem
from secateur.plan.target import Target
from secateur.survey.curves import ErrorCurve, Survey
from secateur.survey.width_costs import WidthCosts


def plan(problem: PlanProblem, widths: str = "adaptive", survey: Survey | None = None) -> Plan:
    """Return the plan with the lowest cost that reaches the target.

    Args:
        problem: The target, and the widths to choose from.
        widths: Value of `--widths`: `adaptive` for a width per block, `uniform` for one width for all blocks.
        survey: Error curves and probes. Without a survey, a uniform plan is the one nearest to the target, and
            adaptive widths are as even as possible.

    Raises:
        SecateurError: No plan reaches the target; the message names the nearest target that a plan reaches.
    """
    if widths == "uniform":
        return _cheapest(problem, uniform_plans(problem), survey)
    costs = WidthCosts(survey or _even_survey(problem))
    found = adaptive_widths(problem, costs)
    if found is None:
        raise _out_of_reach(problem, smallest_size(problem), [])
    return problem.plan(found, costs.total(problem.blocks, found) if survey else None)


def _cheapest(problem: PlanProblem, plans: Sequence[Plan], survey: Survey | None) -> Plan:
    """Return the plan with the lowest cost, or the first plan if there is no survey."""
    if survey is None:
        return plans[0]
    costs = WidthCosts(survey)
    return min(
        (replace(one, cost=costs.total(problem.blocks, one.widths)) for one in plans), key=lambda one: one.cost or 0.0
    )


def _even_survey(problem: PlanProblem) -> Survey:
    """Return a survey that makes even widths the cheapest: a module costs the squared share of its removed units."""
    curves = [
        ErrorCurve(
            index, module.kind, axis.name, tuple((removed / axis.units) ** 2 for removed in range(axis.units)), 1.0
        )
        for index, module in problem.modules
        for axis in module.cut_axes
    ]
    return Survey("none", 0.0, 0, tuple(curves))


def uniform_plans(problem: PlanProblem) -> list[Plan]:
    """Return every plan with one width for all blocks that reaches the target, the nearest to the target first.

    The plans differ in how much they remove from the attention and how much from the feed-forward.

    Raises:
        SecateurError: No such plan reaches the target.
    """
    is_sparsity = not isinstance(problem.target, Target)
    found = search_uniform_widths(problem, allow_excess=is_sparsity)
    if found.smallest_size == problem.meter.dense:
        raise SecateurError(_nothing_to_remove(problem, found.unsupported_reasons))
    if not found.candidates or found.smallest_size > problem.budget + problem.slack:
        raise _out_of_reach(problem, found.smallest_size, found.unsupported_reasons)
    nearest_first = sorted(found.candidates, key=lambda candidate: abs(candidate[1] - problem.budget))
    plans = [problem.plan(problem.uniform_widths(width)) for width, _ in nearest_first]
    return [one for one in plans if one.note is None] or plans[:1]


def uniform_alternative(problem: PlanProblem, sparsity: float) -> str:
    """Return the end of an error message: the options for the plan with one width for all blocks that is nearest to a
    sparsity; empty if there is none."""
    with suppress(SecateurError):
        nearest = uniform_plans(replace(problem, target=sparsity, meter=problem.parameters))[0]
        return f"; the nearest that fits: --widths uniform --sparsity {nearest.sparsity:.3g}"
    return ""


def check_near(nearest: Plan) -> None:
    """Check that the plan nearest to a sparsity is near it. A sparsity near zero asks for the smallest cut.

    Raises:
        SecateurError: It is not; the message names the sparsity that the plan reaches.
    """
    wanted, reached = nearest.requested_sparsity, nearest.sparsity
    if wanted > TOLERANCE and abs(reached - wanted) > LARGEST_MISS:
        raise SecateurError(
            f"sparsity {wanted:.1%} is not possible: of the widths that the format and --round allow, the nearest "
            f"remove {reached:.1%}; ask for --sparsity {reached:.3g}, or change --widths, --modules or --round"
        )


def check_reachable(problem: PlanProblem) -> None:
    """Check, before anything is measured, that adaptive widths can reach the target.

    Raises:
        SecateurError: No plan reaches the target; the message names the nearest target that a plan reaches.
    """
    smallest, block = smallest_size(problem), problem.reference_block
    without = [block.width | module.removed for module in block.modules if module.is_prunable(problem.kinds)]
    reasons = [reason for width in without if (reason := problem.unsupported_reason(width)) is not None]
    if smallest >= problem.meter.dense and (reasons or not isinstance(problem.target, Target)):
        raise SecateurError(_nothing_to_remove(problem, reasons))
    # The two sums add the same numbers in another order, so that they may differ by rounding.
    if smallest > problem.budget + problem.slack + 1e-9 * problem.meter.dense:
        raise _out_of_reach(problem, smallest, reasons)


def _out_of_reach(problem: PlanProblem, smallest: float, reasons: list[str]) -> SecateurError:
    """Return the error for a target that needs a smaller model than the smallest one, `smallest` in meter's units."""
    if isinstance(problem.target, Target):
        return unreachable_error(problem.target, problem.meter, smallest)
    # Rounded down, so that a plan can reach this sparsity.
    most = math.floor(1000 * (problem.meter.dense - smallest) / problem.block_parameters) / 1000
    limits = reasons[:1] if len(problem.kinds) > 1 else [f"only {problem.kinds[0]} may be removed"]
    return SecateurError(
        "; ".join(
            [
                f"sparsity {problem.target:.1%} is out of reach: at most {most:.1%} of the blocks' parameters can be "
                "removed",
                *limits,
            ]
        )
    )


def _nothing_to_remove(problem: PlanProblem, reasons: list[str]) -> str:
    """Return the error message for a problem in which every module has to stay dense."""
    if reasons:
        return f"the format cannot hold any narrower width: {reasons[0]}"
    block = problem.reference_block
    for axis in block.axes:
        if axis.kind in problem.kinds and axis.rounded and axis.units <= problem.multiple:
            return f"--round {problem.multiple} leaves nothing to remove: the model has {axis.units:,} {axis.label}"
    if block.attention.locked:
        return f"heads cannot be removed exactly, because {block.attention.locked}; prune channels"
    needed = [f"{axis.units:,} {axis.label}" for axis in block.axes if axis.kind in problem.kinds]
    return f"nothing can be removed: the model needs all of its {joined(needed)}"
