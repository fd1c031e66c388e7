"""Magnitude, first power: the sum of the absolute weights of a unit, sum |w|, in input and output projections."""

from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.criteria.statistics import Statistics


@criterion()
def scores(stats: Statistics) -> Tensor:
    """Return a score for each unit (units), higher for units to keep."""
    return stats.unit_sums("abs")
