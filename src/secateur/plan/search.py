"""The smallest model within a loss of perplexity: prune, measure on rows left out of the fit, correct, repeat."""

import math
from collections.abc import Callable
from dataclasses import replace

from secateur.base.errors import SecateurError
from secateur.plan.plan import plan
from secateur.plan.problem import Plan, PlanProblem
from secateur.survey.curves import Survey

TRIES, MOST = 5, 10
"""Prunings after which the best one is taken, and after which none is found; each is measured whole."""
CLOSE = 0.97
"""A loss between this share of the allowed one and all of it ends the search."""


def smallest_within(
    problem: PlanProblem, widths: str, survey: Survey, ratio: float, loss: Callable[[Plan], float]
) -> Plan:
    """Find the plan that removes most while the perplexity stays within a ratio.

    The survey's prices add up to about the logarithm of the ratio; each measurement corrects them by a factor.

    Args:
        problem: what plans may do; its goal is replaced.
        widths: see `plan`.
        ratio: the most that perplexity over dense may be, above 1.
        loss: measures perplexity over dense of a plan.

    Raises:
        SecateurError: no plan that was tried stays within the ratio.
    """
    allowed, factor = math.log(ratio), 1.0
    best: Plan | None = None
    tried: Plan | None = None
    lowest = math.inf
    for attempt in range(MOST):
        if attempt >= TRIES and best is not None:
            break
        last, tried = tried, _priced_at(problem, widths, survey, allowed * (1 + CLOSE) / 2 / factor)
        if last is not None and tried.widths == last.widths:
            break
        found = loss(tried)
        lowest = min(lowest, found)
        if found <= ratio and (best is None or tried.sparsity > best.sparsity):
            best = tried
        if CLOSE * allowed <= math.log(found) <= allowed:
            break
        # A refit can beat the dense model on such rows; then go on to larger cuts, but not at once to the largest.
        factor = max(math.log(found) / (tried.cost or 1e-6), factor / 4)
    if best is None:
        raise SecateurError(
            f"target ppl={ratio:g}x: the best plan that was tried came to {lowest:.3f}x; ask for more than that, or "
            "calibrate on more text"
        )
    return best


def _priced_at(problem: PlanProblem, widths: str, survey: Survey, price: float) -> Plan:
    """The largest cut that the survey expects to cost no more."""
    low, high = 0.0, 1.0
    best: Plan | None = None
    for _ in range(12):
        middle = (low + high) / 2
        try:
            tried = plan(replace(problem, target=middle, meter=problem.parameters), widths, survey)
        except SecateurError:
            high = middle
            continue
        if (tried.cost or 0.0) <= price:
            low, best = middle, tried
        else:
            high = middle
            best = best if best is not None or middle > 0.001 else tried
    return best if best is not None else plan(replace(problem, target=0.01, meter=problem.parameters), widths, survey)
