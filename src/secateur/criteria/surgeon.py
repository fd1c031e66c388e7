"""Structured optimal brain surgeon: remove first what the best refit of the rest makes up best.

Greedy and exact: each removal is priced after all before it, with the remaining level-2 weights refitted
(`secateur.numerics.elimination`). So it ranks units, and has no score of one unit alone.
"""

from torch import Tensor

from secateur.criteria.order import elimination
from secateur.criteria.registry import criterion
from secateur.criteria.statistics import Statistics


@criterion("surgeon", kind="ranking")
def ranking(stats: Statistics, axis: str, stop: int) -> Tensor:
    """Return the units in the order in which they leave along an axis."""
    return elimination(stats, axis, stop, with_errors=False).order
