"""Targets that no plan reaches: checks before anything is measured, and errors that name what can be reached."""

import math

from secateur.base.errors import SecateurError
from secateur.base.words import joined
from secateur.plan.problem import LARGEST_MISS, TOLERANCE, Plan, PlanProblem
from secateur.plan.target import SPEEDUPS, Target


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
    smallest, block = problem.smallest_size, problem.reference_block
    without = [block.width | module.removed for module in block.modules if module.is_prunable(problem.kinds)]
    reasons = [reason for width in without if (reason := problem.unsupported_reason(width)) is not None]
    if smallest >= problem.meter.dense and (reasons or not isinstance(problem.target, Target)):
        raise SecateurError(nothing_to_remove(problem, reasons))
    # The two sums add the same numbers in another order, so that they may differ by rounding.
    if smallest > problem.budget + problem.slack + 1e-9 * problem.meter.dense:
        raise out_of_reach(problem, smallest, reasons)


def out_of_reach(problem: PlanProblem, smallest: float, reasons: list[str]) -> SecateurError:
    """Return the error for a target that no plan reaches; its message names the nearest one that a plan reaches.

    Args:
        problem: The target, and the widths to choose from.
        smallest: Size of the model with the narrowest widths, in the meter's unit.
        reasons: Why the format cannot hold narrower widths.
    """
    target, meter = problem.target, problem.meter
    if not isinstance(target, Target):
        # Rounded down, so that a plan can reach this sparsity.
        most = math.floor(1000 * (meter.dense - smallest) / problem.block_parameters) / 1000
        limits = reasons[:1] if len(problem.kinds) > 1 else [f"only {problem.kinds[0]} may be removed"]
        said = f"sparsity {target:.1%} is out of reach: at most {most:.1%} of the blocks' parameters can be removed"
        return SecateurError("; ".join([said, *limits]))
    nearest = _nearest_target(target, meter.original, smallest)
    if nearest is None:
        return SecateurError(
            f"target {target}: the modules that may be pruned do not change this quantity; allow more in --modules or "
            "--blocks"
        )
    return SecateurError(
        f"target {target} is out of reach: the smallest possible value is {meter.format_value(smallest)}, the dense "
        f"model has {meter.format_value(meter.original)}; request {nearest}, or allow more in --modules or --blocks"
    )


def _nearest_target(target: Target, dense: float, smallest: float) -> Target | None:
    """Return the nearest target that a plan reaches, with few digits; None if no plan is smaller than the dense model.

    Args:
        target: The target that no plan reaches.
        dense: Size of the dense model.
        smallest: Size of the model with the narrowest widths.
    """
    if target.quantity in SPEEDUPS:
        speedup = math.floor(100 * dense / smallest) / 100
        return Target(target.quantity, speedup, True) if speedup > 1 else None
    if target.relative:
        share = max(1, math.ceil(1000 * smallest / dense)) / 1000
        return Target(target.quantity, share, True) if share < 1 else None
    step = 10.0 ** (math.floor(math.log10(smallest)) - 2) if smallest > 0 else 1.0
    rounded = max(1.0, math.ceil(smallest / step) * step)
    value = rounded if rounded < dense else math.ceil(smallest)
    return Target(target.quantity, value, False) if value < dense else None


def nothing_to_remove(problem: PlanProblem, reasons: list[str]) -> str:
    """Return the error message for a problem in which every module has to stay dense."""
    if reasons:
        return f"the format cannot hold any narrower width: {reasons[0]}"
    block = problem.reference_block
    for axis in block.axes:
        if axis.kind in problem.kinds and axis.rounded and axis.units <= problem.multiple:
            return f"--round {problem.multiple} leaves nothing to remove: the model has {axis.units:,} {axis.label}"
    if block.heads_locked:
        return f"heads cannot be removed exactly, because {block.heads_locked}; prune channels"
    needed = [f"{axis.units:,} {axis.label}" for axis in block.axes if axis.kind in problem.kinds]
    return f"nothing can be removed: the model needs all of its {joined(needed)}"
