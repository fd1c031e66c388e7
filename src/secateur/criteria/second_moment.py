"""Second moment of a unit's contribution to the module's output (Greedy Output Approximation, criterion B).

For y = B act(A x) with uncentred covariance S of x, channel j is worth 1/2 ||B[:, j]||^2 (A_j S A_j').
A bias of level 1 counts as one more input that is always one.

Gated modules are two such modules, (up, down) and (gate, down); a channel's score is the product of both.
In attention the probabilities are folded into the input, X^ = softmax(..) X, so that A is the value layer
and A_j S^ A_j' is the mean square of level-2 input j itself; a head's score is the sum over its inputs.

S comes from the rows that the statistics were taken of: calibration text, or random token ids. Without any, S is I,
for X^ as for x, and the mean of both is zero.
"""

from dataclasses import replace

import torch
from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.criteria.statistics import Statistics
from secateur.model.axes import ATTENTION
from secateur.model.structure import Slab
from secateur.model.surgery import rows_of


@criterion("second-moment", input_moments=True)
def scores(stats: Statistics) -> Tensor:
    """Score per unit (units); higher = keep."""
    half_norm = 0.5 * stats.weight_ao.double().square().sum(1)
    if stats.module.role == ATTENTION:
        return stats.per_unit(half_norm * stats.moments.mean_square_a())
    result = torch.ones_like(half_norm)
    for slab in stats.module.channel_projections:
        result = result * half_norm * _mean_square(stats, slab)
    return result


@criterion("second-moment-identity")
def identity(stats: Statistics) -> Tensor:
    """The same with S = I, from weights alone: A_j S A_j' is then ||A_j||^2, and b_j^2 more with a bias."""
    half_norm = 0.5 * stats.weight_ao.double().square().sum(1)
    if stats.module.role == ATTENTION:
        return stats.per_unit(half_norm * _value_norms(stats))
    result = torch.ones_like(half_norm)
    for slab in stats.module.channel_projections:
        square = rows_of(slab, stats.tensors).double().square().sum(1)
        bias = _bias(stats, slab)
        result = result * half_norm * (square if bias is None else square + bias.square())
    return result


def _value_norms(stats: Statistics) -> Tensor:
    """Squared norm of the value layer's row, bias included, behind each level-2 input (a)."""
    module = stats.module
    total = torch.zeros(module.units * module.size, dtype=torch.float64, device=stats.weight_ao.device)
    for leaf in ("weight", "bias"):
        # The values come last.
        slab = next((slab for slab in reversed(module.input_projections) if slab.name.endswith(leaf)), None)
        if slab is None:
            continue
        rows = rows_of(slab, stats.tensors).double()
        # A head that has its keys of the same matrix has its values behind them.
        norms = rows.square().view(slab.units, slab.size, -1).sum(2)[:, -module.size :]
        shared = module.units // slab.units
        total += norms.repeat_interleave(shared, dim=0).flatten()
    return total


def _mean_square(stats: Statistics, slab: Slab) -> Tensor:
    """E[(A_j x + b_j)^2] of one level-1 layer's rows."""
    assert stats.input_moments is not None
    rows = rows_of(slab, stats.tensors)
    count = max(stats.input_moments.count, 1)
    mean_square = ((rows @ stats.input_moments.gram()) * rows).sum(1).double() / count
    b = _bias(stats, slab)
    if b is None:
        return mean_square
    return mean_square + 2 * b * (rows.double() @ stats.input_moments.mean_a) + b.square()


def _bias(stats: Statistics, slab: Slab) -> Tensor | None:
    """What the layer adds to a slab's rows, if it has a bias."""
    if slab.bias not in stats.tensors:
        return None
    return rows_of(replace(slab, name=slab.bias, axis=0), stats.tensors).double()
