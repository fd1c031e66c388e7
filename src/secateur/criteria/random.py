"""No criterion at all: seeded random scores, the floor that every other one has to beat."""

import torch
from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.criteria.statistics import Statistics


@criterion("random")
def scores(stats: Statistics) -> Tensor:
    """Score per unit (units); higher = keep."""
    return torch.rand(stats.module.units, generator=torch.Generator().manual_seed(stats.seed)).double()
