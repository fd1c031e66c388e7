"""Search for the smallest model within a limit on perplexity.

Each attempt prunes the model and measures its perplexity on rows that no weight was fitted to. The measurement corrects
the costs of the survey for the next attempt.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from secateur.base.errors import SecateurError
from secateur.plan.plan import plan
from secateur.plan.problem import Plan, PlanProblem
from secateur.survey.curves import Survey

ATTEMPTS = 5
"""Number of attempts after which the best plan so far is taken."""
MAX_ATTEMPTS = 10
"""Number of attempts after which the search fails if no plan was within the limit."""
CLOSE_ENOUGH = 0.97
"""Share of the allowed loss above which a plan within the limit ends the search."""
_BISECTIONS = 12
"""Steps of the bisection for the sparsity with a given cost: its error is 1/4096."""


def smallest_within(
    problem: PlanProblem, widths: str, survey: Survey, ratio: float, loss: Callable[[Plan], float]
) -> Plan:
    """Return the plan with the highest sparsity whose perplexity stays within a ratio to the dense model's.

    The cost of a plan is about the logarithm of the perplexity ratio. Each measurement corrects the costs by a factor.

    Args:
        problem: The widths to choose from; its target is ignored.
        widths: Value of `--widths`; see `plan`.
        survey: Error curves and probes.
        ratio: Limit on the perplexity ratio, pruned over dense, above 1.
        loss: Function that measures the perplexity ratio of a plan, pruned over dense.

    Raises:
        SecateurError: None of the plans that were tried stays within the ratio.
    """
    allowed, factor = math.log(ratio), 1.0
    best: Plan | None = None
    current: Plan | None = None
    lowest = math.inf
    for attempt in range(MAX_ATTEMPTS):
        if attempt >= ATTEMPTS and best is not None:
            break
        previous, current = current, _largest_cut(problem, widths, survey, allowed * (1 + CLOSE_ENOUGH) / 2 / factor)
        if previous is not None and current.widths == previous.widths:
            break
        measured = loss(current)
        lowest = min(lowest, measured)
        if measured <= ratio and (best is None or current.sparsity > best.sparsity):
            best = current
        if CLOSE_ENOUGH * allowed <= math.log(measured) <= allowed:
            break
        # A refitted model can have a lower loss than the dense one. The factor then falls by no more than four at a
        # time, so that the next cut is larger but not at once the largest.
        factor = max(math.log(measured) / (current.cost or 1e-6), factor / 4)
    if best is None:
        raise SecateurError(
            f"target ppl={ratio:g}x: the best of the plans that were tried has {lowest:.3f}x the dense model's "
            "perplexity; allow more than that, or calibrate on more text"
        )
    return best


def _largest_cut(problem: PlanProblem, widths: str, survey: Survey, max_cost: float) -> Plan:
    """Return the plan with the highest sparsity whose cost by the survey is at most `max_cost`, in nats per token."""

    def problem_at(sparsity: float) -> PlanProblem:
        return replace(problem, target=sparsity, meter=problem.parameters)

    low, high = 0.0, 1.0
    best: Plan | None = None
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        current: Plan | None = None
        # A sparsity that no plan reaches counts as too expensive.
        with suppress(SecateurError):
            current = plan(problem_at(middle), widths, survey)
        if current is not None and (current.cost or 0.0) <= max_cost:
            low, best = middle, current
        else:
            high = middle
            # If every plan is too expensive, the smallest cut is returned.
            best = best if best is not None or middle > 0.001 else current
    return best if best is not None else plan(problem_at(0.01), widths, survey)
