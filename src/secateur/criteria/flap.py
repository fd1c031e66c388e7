"""FLAP: the score of a unit is how much its contribution fluctuates around the mean; a bias can replace the mean.

With x_j the inputs of the output projection and W its weight, inputs first, the three metrics of input j are

    wifv   var(x_j) * ||W[j, :]||^2              weighted input feature variance, the method's own
    ifv    var(x_j)                              input feature variance
    wifn   mean_o |W[j, o]| * sqrt(E[x_j^2])     weighted input feature norm

The score of a channel is its metric. The score of a head is the sum of the squared metrics of its inputs, as in the
authors' program.

Source: An et al., 2023, *Fluctuation-based Adaptive Structured Pruning for Large Language Models*.

Shapes: a inputs of the output projection, o outputs.
"""

from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.criteria.statistics import Statistics
from secateur.model.axes import ATTENTION


@criterion()
def wifv(stats: Statistics) -> Tensor:
    """Return a score for each unit (units), higher for units to keep."""
    return stats.per_unit(fluctuations(stats))


@criterion()
def ifv(stats: Statistics) -> Tensor:
    """Return a score for each unit (units), higher for units to keep."""
    return stats.per_unit(_squared_in_attention(stats, _variance(stats)))


@criterion()
def wifn(stats: Statistics) -> Tensor:
    """Return a score for each unit (units), higher for units to keep."""
    norm_a = stats.moments.mean_square_a().sqrt()
    return stats.per_unit(_squared_in_attention(stats, stats.weight_ao.double().abs().mean(1) * norm_a))


def fluctuations(stats: Statistics) -> Tensor:
    """Return the terms of `wifv` (a), float64; in an attention they are squared already."""
    return _squared_in_attention(stats, _variance(stats) * stats.weight_ao.double().square().sum(1))


def _variance(stats: Statistics) -> Tensor:
    """Return var(x_j) of every input (a)."""
    # Rounding may leave a constant input just below zero.
    return (stats.moments.mean_square_a() - stats.moments.mean_a.square()).clamp_min(0)


def _squared_in_attention(stats: Statistics, metric_a: Tensor) -> Tensor:
    return metric_a.square() if stats.module.role == ATTENTION else metric_a
