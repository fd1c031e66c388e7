"""The order in which a module's units are removed along an axis, and the error curve along it.

One step along an axis removes a whole KV group, one query head of every group, or one channel. In all functions, `stop`
is the number of units that are left along the axis.

Shapes: u units of a module.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from secateur.criteria.registry import Criterion
from secateur.criteria.statistics import Statistics
from secateur.model.structure import PrunableModule
from secateur.numerics.elimination import Elimination, eliminate


def removal_order(criterion: Criterion, stats: Statistics, axis: str, stop: int) -> Tensor:
    """Return the units of an axis in order of removal, by a criterion."""
    module = stats.module
    if criterion.ranking is not None and not criterion.removed_first:
        return criterion.ranking(stats, axis, stop)
    if criterion.ranking is not None:
        scores = _ranks(module, axis, criterion.ranking(stats, axis, 1))
    else:
        assert criterion.score is not None
        scores = criterion.score(stats)
    return _ascending(put_first(scores, criterion.removed_first, module.per_group), module, axis, stop)


def error_curve(
    criterion: Criterion,
    stats: Statistics,
    axis: str,
    order_stats: Statistics | None = None,
    weights_at: Collection[int] = (),
) -> Elimination:
    """Return the error after the best refit at every width from the dense one down to one unit.

    Args:
        criterion: The criterion that determines the order of removal.
        stats: Statistics on which the errors are measured.
        axis: Name of the axis along which units are removed.
        order_stats: Statistics that determine the order, if not `stats`.
        weights_at: Numbers of removed units at which the refitted weights are returned.
    """
    greedy = criterion.ranking is not None and order_stats is None and not criterion.removed_first
    order = None if greedy else removal_order(criterion, order_stats or stats, axis, 1)
    return elimination(stats, axis, 1, order=order, weights_at=weights_at)


def elimination(
    stats: Statistics,
    axis: str,
    stop: int,
    *,
    order: Tensor | None = None,
    with_errors: bool = True,
    weights_at: Collection[int] = (),
) -> Elimination:
    """Remove units along an axis, greedily or in a given order; see `secateur.numerics.elimination.eliminate`."""
    module = stats.module
    size = module.size * module.nested_units(axis)
    groups = None if axis == module.output_projection.along[0] else module.enclosing_units(axis)
    return eliminate(
        stats.normal, size, stop=stop, groups=groups, order=order, with_errors=with_errors, weights_at=weights_at
    )


def remaining_units(module: PrunableModule, axis: str, order: Tensor) -> tuple[int, ...]:
    """Return the units (heads or channels) that are left after those in `order` are removed along an axis."""
    removed, nested = set(order.tolist()), module.nested_units(axis)
    return tuple(unit for unit in range(module.units) if unit // nested not in removed)


def put_first(scores: Tensor, first: frozenset[int], per_group: int) -> Tensor:
    """Return scores (u) lowered so that some heads, and the groups with most of them, are removed before all others."""
    if not first:
        return scores
    is_first = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    is_first[list(first)] = True
    # Larger than the difference between the summed scores of any two groups.
    step = 2 * per_group * float(scores.max() - scores.min()) or 1.0
    return torch.where(is_first, scores - step, scores)


def _ranks(module: PrunableModule, axis: str, order: Tensor) -> Tensor:
    """Return the place of each unit (u) in an order of removal; units that are not removed come last."""
    nested = module.nested_units(axis)
    result = torch.full((module.units // nested,), float(module.units), dtype=torch.float64)
    result[order.cpu()] = torch.arange(len(order), dtype=torch.float64)
    return result.repeat_interleave(nested)


def _ascending(scores: Tensor, module: PrunableModule, axis: str, stop: int) -> Tensor:
    """Return the units of an axis by ascending score, one unit of every enclosing group at a time."""
    full, groups = module.axis(axis).units, module.enclosing_units(axis)
    by_unit = scores.cpu().view(groups, full, module.nested_units(axis))
    totals = by_unit.sum(2) if by_unit.shape[2] > 1 else by_unit[..., 0]
    order = totals.argsort(dim=1, stable=True)[:, : full - stop]
    return (order + torch.arange(groups)[:, None] * full).T.reshape(-1)
