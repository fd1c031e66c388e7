"""Magnitude, first power: the sum of a unit's absolute weights, in both levels."""

from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.criteria.statistics import Statistics


@criterion("l1")
def scores(stats: Statistics) -> Tensor:
    """Score per unit (units); higher = keep."""
    return stats.unit_sums("abs")
