"""Wanda-sp: |W[j, :]|_1 * sqrt(E[x_j^2]), summed over the inputs j of the output projection that belong to a unit.

Source: the structured variant of Wanda (Sun et al., 2023) that FLAP (An et al., 2023) compares with.
"""

from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.criteria.statistics import Statistics


@criterion()
def scores(stats: Statistics) -> Tensor:
    """Return a score for each unit (units), higher for units to keep."""
    norm_a = stats.moments.mean_square_a().sqrt()
    return stats.per_unit(stats.weight_ao.double().abs().sum(1) * norm_a)
