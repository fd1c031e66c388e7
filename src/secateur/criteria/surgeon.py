"""Structured optimal brain surgeon: remove first what the best refit of the rest makes up best.

Greedy and exact: each removal is priced after all before it, with the remaining level-2 weights refitted.
The pass gives an order and with it the error at every width (`secateur.numerics.solve.eliminate`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.criteria.statistics import Statistics
from secateur.model.structure import Pattern
from secateur.numerics.solve import Elimination, eliminate


def removal(
    stats: Statistics, pattern: Pattern, stop: int, *, order: Tensor | None = None, prices: bool
) -> Elimination:
    """Eliminate until `stop` units of the pattern are left, greedily or in a given order.

    `secateur.criteria.removal_order` says what units and `stop` are.
    """
    module = stats.module
    size = module.size * (module.per_group if pattern == "groups" else 1)
    groups = module.groups if pattern == "heads" else None
    return eliminate(stats.normal, size, stop=stop, groups=groups, order=order, prices=prices)


def ranks(stats: Statistics, pattern: Pattern) -> Tensor:
    """The place of each unit (units) in the order of removal; those that never leave come last."""
    module = stats.module
    together = module.per_group if pattern == "groups" else 1
    result = torch.full((module.units // together,), float(module.units), dtype=torch.float64)
    order = removal(stats, pattern, 1, prices=False).order.cpu()
    result[order] = torch.arange(len(order), dtype=torch.float64)
    return result.repeat_interleave(together)
