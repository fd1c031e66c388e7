"""Plans: the widths with the lowest cost that reach a target, found before any weight is changed.

The size of a model (`plan/meters.py`) and the cost of a plan (`survey/width_costs.py`) are sums over modules. The
widths with the lowest cost are therefore the solution of a separable knapsack problem (`plan/knapsack.py`).
"""

from dataclasses import replace

import numpy as np

from secateur.model.axes import Width
from secateur.plan.knapsack import select_near, select_options, total
from secateur.plan.problem import Plan, PlanProblem
from secateur.plan.reach import out_of_reach
from secateur.plan.uniform import uniform_plans
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
    costs = WidthCosts(survey or _even_survey(problem))
    if widths == "uniform":
        plans = uniform_plans(problem)
        if survey is None:
            return plans[0]
        costed = [replace(one, cost=costs.total(problem.blocks, one.widths)) for one in plans]
        return min(costed, key=lambda one: one.cost or 0.0)
    found = _adaptive_widths(problem, costs)
    if found is None:
        raise out_of_reach(problem, problem.smallest_size, [])
    return problem.plan(found, costs.total(problem.blocks, found) if survey else None)


def _adaptive_widths(problem: PlanProblem, costs: WidthCosts) -> dict[int, Width] | None:
    """Return the widths of the pruned blocks with the lowest total cost within the budget.

    Returns:
        The width of each pruned block by its index; None if even the narrowest widths exceed the budget by more than
        its slack.
    """
    result, modules = problem.dense_widths, problem.modules
    options = [problem.options(index, module) for index, module in modules]
    sizes = [np.array([size for _, size in each]) for each in options]
    module_costs = [
        np.array([costs.module_cost(index, module, width) for width, _ in each])
        for (index, module), each in zip(modules, options, strict=True)
    ]
    constant = problem.meter.total(result) - sum(float(size[0]) for size in sizes)
    budget, smallest = problem.budget - constant, float(sum(np.min(size) for size in sizes))
    best = select_options(module_costs, sizes, max(budget, min(smallest, budget + problem.slack)))
    if best is None:
        return None
    if problem.slack and total(sizes, best) < budget - problem.slack:
        # Widths are coarse, or units cost nothing: the cheapest plan that removes enough removes too much.
        best = select_near(module_costs, sizes, budget, problem.slack)
    for (index, module), each, option in zip(modules, options, best, strict=True):
        result[index] |= {axis.name: each[option][0][axis.name] for axis in module.axes}
    return result


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
