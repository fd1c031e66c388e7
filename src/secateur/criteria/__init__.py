"""Which units go first. One file a criterion: a function from a module's statistics to a score per unit.

`surgeon` is the exception that yields an order in place of scores, since what a unit is worth there depends on
the units that went before it. To add a criterion, write its file and add one line to `SCORES`
and its name to `secateur.criteria.choice.CRITERIA`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from secateur.criteria import flap, l1, l2, llm_pruner, random, second_moment, similarity, surgeon, wanda
from secateur.criteria.statistics import Statistics
from secateur.model.structure import Depth2, Pattern
from secateur.numerics.solve import Elimination

__all__ = ["NEEDS_GRADIENTS", "NEEDS_INPUTS", "Statistics", "error_curve"]
__all__ += ["pattern_units", "removal_order", "survivors"]

SCORES: dict[str, Callable[[Statistics], Tensor]] = {
    "second-moment": second_moment.scores,
    "second-moment-identity": second_moment.identity,
    "wanda": wanda.scores,
    "flap-wifv": flap.wifv,
    "flap-ifv": flap.ifv,
    "flap-wifn": flap.wifn,
    "l1": l1.scores,
    "l2": l2.scores,
    "random": random.scores,
    **dict.fromkeys(llm_pruner.FROM_GRADIENTS, llm_pruner.scores),
    "similarity": similarity.scores,
}
NEEDS_INPUTS = frozenset({"second-moment"})
"""Criteria that look at the module's own input, not only at the level-2 layer's."""
NEEDS_GRADIENTS = frozenset(llm_pruner.FROM_GRADIENTS)
"""Criteria whose scores come from a backward pass ahead of pruning."""


def removal_order(criterion: str, stats: Statistics, pattern: Pattern, stop: int) -> Tensor:
    """Pattern units in the order in which they leave, until `stop` of them are left.

    With the pattern `groups` a unit is a key/value group; with `heads` it is a query head, one of every group
    leaves per round, and `stop` counts the heads left in each; with `channels` it is a channel.
    """
    if criterion == "surgeon" and not stats.similar:
        return surgeon.removal(stats, pattern, stop, prices=False).order
    scores = surgeon.ranks(stats, pattern) if criterion == "surgeon" else SCORES[criterion](stats)
    return _by_score(similarity.similar_first(scores, stats), stats.module, pattern, stop)


def error_curve(
    criterion: str, stats: Statistics, pattern: Pattern, stop: int, choice: Statistics | None = None
) -> Elimination:
    """The error after the best refit at every width down to `stop`, units leaving in the criterion's order.

    The order comes from the statistics `choice` where there are such, errors always from `stats`.
    """
    greedy = criterion == "surgeon" and choice is None and not stats.similar
    order = None if greedy else removal_order(criterion, choice or stats, pattern, stop)
    return surgeon.removal(stats, pattern, stop, order=order, prices=True)


def survivors(module: Depth2, pattern: Pattern, order: Tensor) -> tuple[int, ...]:
    """The units (heads or channels) that are left once the pattern units in `order` have gone."""
    gone = set(order.tolist())
    if pattern == "groups":
        return tuple(head for head in range(module.units) if head // module.per_group not in gone)
    return tuple(unit for unit in range(module.units) if unit not in gone)


def pattern_units(module: Depth2, pattern: Pattern) -> int:
    """How many steps of width the pattern has: groups, heads per group, or channels."""
    return {"groups": module.groups, "heads": module.per_group, "channels": module.units}[pattern]


def _by_score(scores: Tensor, module: Depth2, pattern: Pattern, stop: int) -> Tensor:
    scores = scores.cpu()
    if pattern == "channels":
        return scores.argsort(stable=True)[: module.units - stop]
    by_group = scores.view(module.groups, module.per_group)
    if pattern == "groups":
        return by_group.sum(1).argsort(stable=True)[: module.groups - stop]
    rounds = by_group.argsort(dim=1, stable=True)[:, : module.per_group - stop]
    heads = rounds + torch.arange(module.groups)[:, None] * module.per_group
    return heads.T.reshape(-1)
