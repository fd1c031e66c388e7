"""Wanda-sp: absolute level-2 weights times the norm of their input, summed over a unit.

Source: the structured variant of Wanda (Sun et al., 2023) that FLAP (An et al., 2023) compares with.
"""

from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.criteria.statistics import Statistics


@criterion("wanda")
def scores(stats: Statistics) -> Tensor:
    """Score per unit (units): sum over its inputs j of ||W[j, :]||_1 * sqrt(E[x_j^2]); higher = keep."""
    norm = stats.moments.mean_square_a().sqrt()
    return stats.per_unit(stats.weight_ao.double().abs().sum(1) * norm)
