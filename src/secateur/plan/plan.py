"""The widths that cost least and meet a target, decided before any weight is touched."""

import math
from dataclasses import replace

from secateur.base.errors import SecateurError
from secateur.plan.allocation import adaptive, narrowest, uniform
from secateur.plan.meters import unreachable_error
from secateur.plan.problem import TOLERANCE, Plan, PlanProblem
from secateur.plan.target import Target
from secateur.survey.curves import ErrorCurve, Survey
from secateur.survey.width_costs import WidthCosts


def plan(problem: PlanProblem, widths: str = "adaptive", survey: Survey | None = None) -> Plan:
    """The widths that cost least and meet the target.

    Args:
        widths: `adaptive`, each module its own; or `uniform`, one width for all chosen blocks.
        survey: error curves and probes; without one, a uniform plan is the nearest to the target, and adaptive widths
            are as even as they can be.

    Raises:
        SecateurError: for a target that the modules cannot meet, with the nearest that they can.
    """
    if widths == "uniform":
        possible = uniform_plans(problem)
        if survey is None:
            return possible[0]
        prices = WidthCosts(survey)
        costs = [prices.total(problem.blocks, one.widths) for one in possible]
        return replace(possible[costs.index(min(costs))], cost=min(costs))
    prices = WidthCosts(survey or _even(problem))
    found = adaptive(problem, prices)
    if found is None:
        raise _out_of_reach(problem, narrowest(problem), [])
    return problem.plan(found, prices.total(problem.blocks, found) if survey else None)


def _even(problem: PlanProblem) -> Survey:
    """Stands in for a survey: the square of the share of its units that goes is what a module costs."""
    curves = [
        ErrorCurve(index, module.kind, axis.name, tuple((gone / axis.units) ** 2 for gone in range(axis.units)), 1.0)
        for index in problem.pruned_blocks
        for module in problem.blocks[index].modules
        for axis in module.cut_axes
    ]
    return Survey("none", 0.0, 0, tuple(curves))


def uniform_plans(problem: PlanProblem) -> list[Plan]:
    """Every split of one width between heads and channels that meets the target, the nearest first."""
    share = not isinstance(problem.target, Target)
    found, least, reasons = uniform(problem, over=share)
    if least == problem.meter.dense:
        raise SecateurError(_nothing(problem, reasons))
    # A share of the parameters is met to within half a point, anything else is a limit.
    slack = TOLERANCE * problem.block_parameters if share else 0.0
    if not found or least > problem.budget + slack:
        raise _out_of_reach(problem, least, reasons)
    found.sort(key=lambda one: abs(one[1] - problem.budget))
    plans = [problem.plan(problem.uniform_widths(width), nearest=True) for width, _ in found]
    near = [one for one in plans if one.note is None]
    return near or plans[:1]


def uniform_alternative(sparsity: float) -> str:
    """How to ask for as much with one width for all blocks, as far as a format holds it."""
    return f"--widths uniform --sparsity {sparsity:.3g}, or less where that is refused"


def check_reachable(problem: PlanProblem) -> None:
    """See that adaptive widths can meet the target, before anything is measured."""
    least = narrowest(problem)
    dense, modules = problem.reference_block.width, problem.is_prunable(problem.reference_block)
    reasons = list(filter(None, (problem.unsupported_reason(dense | module.removed) for module in modules)))
    if least >= problem.meter.dense and (reasons or not isinstance(problem.target, Target)):
        raise SecateurError(_nothing(problem, reasons))
    # Sums in another order are rounded otherwise.
    if least > problem.budget + 1e-9 * problem.meter.dense:
        raise _out_of_reach(problem, least, reasons)


def _out_of_reach(problem: PlanProblem, least: float, reasons: list[str]) -> SecateurError:
    """The target is more than the modules hold."""
    if isinstance(problem.target, Target):
        return unreachable_error(problem.target, problem.meter, least)
    # Rounded down, so that it can be had.
    most = math.floor(1000 * (problem.meter.dense - least) / problem.block_parameters) / 1000
    return SecateurError(
        f"a sparsity of {problem.target:.1%} of the blocks is more than the modules hold: at most {most:.1%} can go"
        + (f" (only {problem.kinds[0]} were asked for)" if len(problem.kinds) == 1 else "")
        + (f"; {reasons[0]}" if reasons and len(problem.kinds) > 1 else "")
    )


def _nothing(problem: PlanProblem, reasons: list[str]) -> str:
    """Why no width is left at all."""
    block = problem.reference_block
    if reasons:
        return f"the format cannot hold this: {reasons[0]}"
    if block.feed_forward.kind == "channels" in problem.kinds and problem.multiple >= block.feed_forward.units:
        return (
            f"round is {problem.multiple}, but the model has {block.feed_forward.units:,} channels; take a smaller one"
        )
    if block.attention.locked:
        return f"heads cannot be removed exactly, as {block.attention.locked}; prune channels"
    return "one head and one channel are all that there is; nothing can go"
