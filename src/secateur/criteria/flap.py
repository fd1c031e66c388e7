"""FLAP: how much a unit's contribution fluctuates around its mean, which a bias can replace.

Source: An et al., 2023, *Fluctuation-based Adaptive Structured Pruning for Large Language Models*, whose three
metrics of a level-2 input j are

    wifv   var(x_j) * ||W[j, :]||^2              weighted input feature variance, the method's own
    ifv    var(x_j)
    wifn   mean_o |W[j, o]| * sqrt(E[x_j^2])     weighted input feature norm

A channel's score is its metric. A head's is the sum of the squares over its inputs, as the authors' program has it.
"""

from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.criteria.statistics import Statistics
from secateur.model.axes import ATTENTION


@criterion("flap-wifv")
def wifv(stats: Statistics) -> Tensor:
    """Score per unit (units); higher = keep."""
    return stats.per_unit(fluctuations(stats))


@criterion("flap-ifv")
def ifv(stats: Statistics) -> Tensor:
    """Score per unit (units); higher = keep."""
    return stats.per_unit(_shaped(stats, _variance(stats)))


@criterion("flap-wifn")
def wifn(stats: Statistics) -> Tensor:
    """Score per unit (units); higher = keep."""
    norm = stats.moments.mean_square_a().sqrt()
    return stats.per_unit(_shaped(stats, stats.weight_ao.double().abs().mean(1) * norm))


def fluctuations(stats: Statistics) -> Tensor:
    """What `wifv` sums: one value per level-2 input (a), float64; already squared in attention."""
    return _shaped(stats, _variance(stats) * stats.weight_ao.double().square().sum(1))


def _variance(stats: Statistics) -> Tensor:
    # Rounding can leave a constant input just below zero.
    return (stats.moments.mean_square_a() - stats.moments.mean_a.square()).clamp_min(0)


def _shaped(stats: Statistics, metric_a: Tensor) -> Tensor:
    return metric_a.square() if stats.module.role == ATTENTION else metric_a
