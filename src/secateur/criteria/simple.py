"""Criteria of one line each: magnitude, random scores and Wanda-sp.

Each returns a score for each unit (units), higher for units to keep.
"""

import torch
from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.criteria.statistics import Statistics, sum_by_unit


@criterion()
def l1(stats: Statistics) -> Tensor:
    """Return magnitudes, first power: sum |w| over the weights of a unit, in input and output projections."""
    return sum_by_unit(stats.module, stats.tensors, lambda rows: rows.abs().sum(1))


@criterion()
def l2(stats: Statistics) -> Tensor:
    """Return magnitudes, second power: sqrt(sum w^2) over the weights of a unit, in input and output projections."""
    return sum_by_unit(stats.module, stats.tensors, lambda rows: rows.square().sum(1)).sqrt()


@criterion()
def random(stats: Statistics) -> Tensor:
    """Return random scores from a seed, as a baseline for other criteria."""
    return torch.rand(stats.module.units, generator=torch.Generator().manual_seed(stats.seed)).double()


@criterion()
def wanda(stats: Statistics) -> Tensor:
    """Return Wanda-sp's scores: |W[j, :]|_1 * sqrt(E[x_j^2]), summed over the inputs j that belong to a unit.

    Source: the structured variant of Wanda (Sun et al., 2023) that FLAP (An et al., 2023) compares with.
    """
    norm_a = stats.moments.mean_square_a().sqrt()
    return stats.per_unit(stats.weight_ao.double().abs().sum(1) * norm_a)
