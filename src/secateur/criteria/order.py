"""Orders in which a module's units leave, and the error of the best refit at every width.

A step along an axis removes a whole KV group, one query head of every group, or one channel. `stop` is the number that
is left along the axis.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from secateur.criteria.registry import Criterion
from secateur.criteria.statistics import Statistics
from secateur.model.structure import PrunableModule
from secateur.numerics.elimination import Elimination, eliminate


def removal_order(criterion: Criterion, stats: Statistics, axis: str, stop: int) -> Tensor:
    """Return the units in the order in which they leave along an axis, until `stop` of them are left."""
    module = stats.module
    if criterion.ranking is not None:
        if not criterion.removed_first:
            return criterion.ranking(stats, axis, stop)
        scores = _ranks(module, axis, criterion.ranking(stats, axis, 1))
    else:
        assert criterion.score is not None
        scores = criterion.score(stats)
    return _by_score(put_first(scores, criterion.removed_first, module.per_group), module, axis, stop)


def error_curve(
    criterion: Criterion,
    stats: Statistics,
    axis: str,
    stop: int,
    choice: Statistics | None = None,
    weights_at: Collection[int] = (),
) -> Elimination:
    """The error after the best refit at every width down to `stop`, units leaving in the criterion's order.

    The order comes from the statistics `choice` where there are such, errors always from `stats`, and weights where
    `weights_at` units are gone.
    """
    greedy = criterion.ranking is not None and choice is None and not criterion.removed_first
    order = None if greedy else removal_order(criterion, choice or stats, axis, stop)
    return elimination(stats, axis, stop, order=order, weights_at=weights_at)


def elimination(
    stats: Statistics,
    axis: str,
    stop: int,
    *,
    order: Tensor | None = None,
    with_errors: bool = True,
    weights_at: Collection[int] = (),
) -> Elimination:
    """Remove units until `stop` are left along an axis, greedily or in a given order."""
    module = stats.module
    size = module.size * module.nested_units(axis)
    groups = None if axis == module.output_projection.along[0] else module.enclosing_units(axis)
    return eliminate(
        stats.normal, size, stop=stop, groups=groups, order=order, with_errors=with_errors, weights_at=weights_at
    )


def remaining_units(module: PrunableModule, axis: str, order: Tensor) -> tuple[int, ...]:
    """Return the units (heads or channels) that are left once those in `order` have left along an axis."""
    gone, together = set(order.tolist()), module.nested_units(axis)
    return tuple(unit for unit in range(module.units) if unit // together not in gone)


def put_first(scores: Tensor, first: frozenset[int], per_group: int) -> Tensor:
    """Return scores (units) by which some heads, and groups with more of them, leave before all others."""
    if not first:
        return scores
    leaving = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    leaving[list(first)] = True
    # More than all other scores of a group can differ by.
    step = 2 * per_group * float(scores.max() - scores.min()) or 1.0
    return torch.where(leaving, scores - step, scores)


def _ranks(module: PrunableModule, axis: str, order: Tensor) -> Tensor:
    """The place of each unit (units) in an order of removal; those that never leave come last."""
    together = module.nested_units(axis)
    result = torch.full((module.units // together,), float(module.units), dtype=torch.float64)
    result[order.cpu()] = torch.arange(len(order), dtype=torch.float64)
    return result.repeat_interleave(together)


def _by_score(scores: Tensor, module: PrunableModule, axis: str, stop: int) -> Tensor:
    """Return the units of an axis by ascending score; of each round one from every outer number."""
    full, rounds = module.axis(axis).units, module.enclosing_units(axis)
    each = scores.cpu().view(rounds, full, module.nested_units(axis))
    order = (each.sum(2) if each.shape[2] > 1 else each[..., 0]).argsort(dim=1, stable=True)[:, : full - stop]
    return (order + torch.arange(rounds)[:, None] * full).T.reshape(-1)
