"""Magnitude, second power: the norm of a unit's weights, in both levels."""

from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.criteria.statistics import Statistics


@criterion("l2")
def scores(stats: Statistics) -> Tensor:
    """Score per unit (units); higher = keep."""
    return stats.unit_sums("square").sqrt()
