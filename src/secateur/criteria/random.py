"""Random scores from a seed, as a baseline for other criteria."""

import torch
from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.criteria.statistics import Statistics


@criterion()
def scores(stats: Statistics) -> Tensor:
    """Return a score for each unit (units), higher for units to keep."""
    return torch.rand(stats.module.units, generator=torch.Generator().manual_seed(stats.seed)).double()
