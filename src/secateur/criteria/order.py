"""Orders in which a module's units leave, and the error of the best refit at every width.

With the pattern `groups` a unit is a key/value group; with `heads` it is a query head, one of every group leaves per
round, and `stop` counts the heads left in each; with `channels` it is a channel.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from secateur.criteria.registry import Criterion
from secateur.criteria.similarity import put_first
from secateur.criteria.statistics import Statistics
from secateur.model.structure import Depth2, Pattern
from secateur.numerics.elimination import Elimination, eliminate


def removal_order(criterion: Criterion, stats: Statistics, pattern: Pattern, stop: int) -> Tensor:
    """Pattern units in the order in which they leave, until `stop` of them are left."""
    module = stats.module
    if criterion.ranking is not None:
        if not criterion.first:
            return criterion.ranking(stats, pattern, stop)
        scores = _ranks(module, pattern, criterion.ranking(stats, pattern, 1))
    else:
        assert criterion.score is not None
        scores = criterion.score(stats)
    return _by_score(put_first(scores, criterion.first, module.per_group), module, pattern, stop)


def error_curve(
    criterion: Criterion,
    stats: Statistics,
    pattern: Pattern,
    stop: int,
    choice: Statistics | None = None,
    cuts: Collection[int] = (),
) -> Elimination:
    """The error after the best refit at every width down to `stop`, units leaving in the criterion's order.

    The order comes from the statistics `choice` where there are such, errors always from `stats`, and weights where
    `cuts` units are gone.
    """
    greedy = criterion.ranking is not None and choice is None and not criterion.first
    order = None if greedy else removal_order(criterion, choice or stats, pattern, stop)
    return elimination(stats, pattern, stop, order=order, cuts=cuts)


def elimination(
    stats: Statistics,
    pattern: Pattern,
    stop: int,
    *,
    order: Tensor | None = None,
    prices: bool = True,
    cuts: Collection[int] = (),
) -> Elimination:
    """Remove units until `stop` of the pattern are left, greedily or in a given order."""
    module = stats.module
    size = module.size * (module.per_group if pattern == "groups" else 1)
    groups = module.groups if pattern == "heads" else None
    return eliminate(stats.normal, size, stop=stop, groups=groups, order=order, prices=prices, cuts=cuts)


def survivors(module: Depth2, pattern: Pattern, order: Tensor) -> tuple[int, ...]:
    """The units (heads or channels) that are left once the pattern units in `order` have gone."""
    gone = set(order.tolist())
    if pattern == "groups":
        return tuple(head for head in range(module.units) if head // module.per_group not in gone)
    return tuple(unit for unit in range(module.units) if unit not in gone)


def _ranks(module: Depth2, pattern: Pattern, order: Tensor) -> Tensor:
    """The place of each unit (units) in an order of removal; those that never leave come last."""
    together = module.per_group if pattern == "groups" else 1
    result = torch.full((module.units // together,), float(module.units), dtype=torch.float64)
    result[order.cpu()] = torch.arange(len(order), dtype=torch.float64)
    return result.repeat_interleave(together)


def _by_score(scores: Tensor, module: Depth2, pattern: Pattern, stop: int) -> Tensor:
    """Pattern units by ascending score."""
    scores = scores.cpu()
    if pattern == "channels":
        return scores.argsort(stable=True)[: module.units - stop]
    by_group = scores.view(module.groups, module.per_group)
    if pattern == "groups":
        return by_group.sum(1).argsort(stable=True)[: module.groups - stop]
    rounds = by_group.argsort(dim=1, stable=True)[:, : module.per_group - stop]
    heads = rounds + torch.arange(module.groups)[:, None] * module.per_group
    return heads.T.reshape(-1)
