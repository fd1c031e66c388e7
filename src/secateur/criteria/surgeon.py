"""Structured optimal brain surgeon: remove first the units whose output the best refit of the others reproduces best.

If the weights are refitted after every removal, removing unit S raises the minimum by tr(W_S' (H^-1_SS)^-1 W_S); see
`secateur.numerics.elimination`. The criterion is a ranking instead of scores, because the cost of a unit depends on the
units removed before it.
"""

from torch import Tensor

from secateur.criteria.order import elimination
from secateur.criteria.registry import criterion
from secateur.criteria.statistics import Statistics


@criterion(field="ranking")
def ranking(stats: Statistics, axis: str, stop: int) -> Tensor:
    """Return the units of an axis in order of removal, until `stop` of them are left."""
    return elimination(stats, axis, stop, with_errors=False).order
