"""Second moment of a unit's contribution to the module's output: criterion B of Greedy Output Approximation.

For y = B act(A x) and S = E[x x'], the uncentred covariance of the module's input,

    score_j = 1/2 ||B[:, j]||^2 (A_j S A_j')        A_j: row j of A; B[:, j]: column j of B

- A bias of the input projection is one more input that is always one.
- A gated feed-forward is two such modules, (up, down) and (gate, down); a channel's score is their product.
- In an attention, the input is multiplied by the attention probabilities, X^ = softmax(..) X. Then A is the value
  layer, and A_j S^ A_j' is the mean square of input j of the output projection. A head's score is the sum over its
  inputs.
- S comes from the rows on which the statistics were measured: calibration rows, or random token ids. Without such rows,
  S and S^ are the identity, and the mean input is zero.

Source: Li, Dong, Lei, 2025, *Greedy Output Approximation*, CPAL.

Shapes: a inputs of the output projection, d inputs of the module.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.criteria.statistics import Statistics
from secateur.model.axes import ATTENTION
from secateur.model.structure import Slab
from secateur.model.surgery import rows_of


@criterion(input_moments=True)
def scores(stats: Statistics) -> Tensor:
    """Return a score for each unit (units), higher for units to keep; S is measured."""
    return _scores(stats, lambda stats: stats.moments.mean_square_a(), _mean_square)


@criterion()
def identity(stats: Statistics) -> Tensor:
    """Return a score for each unit (units), higher for units to keep; S is the identity."""
    return _scores(stats, _value_norms, _row_norms)


def _scores(
    stats: Statistics, of_heads: Callable[[Statistics], Tensor], of_channels: Callable[[Statistics, Slab], Tensor]
) -> Tensor:
    """Return the scores, with functions that return A_j S^ A_j' in an attention, and A_j S A_j' of a projection (a)."""
    half_norm_a = 0.5 * stats.weight_ao.double().square().sum(1)
    if stats.module.role == ATTENTION:
        return stats.per_unit(half_norm_a * of_heads(stats))
    result = torch.ones_like(half_norm_a)
    for slab in stats.module.channel_projections:
        result = result * half_norm_a * of_channels(stats, slab)
    return result


def _row_norms(stats: Statistics, slab: Slab) -> Tensor:
    """Return ||A_j||^2, plus b_j^2 if there is a bias, for the rows j of one input projection (a)."""
    square = rows_of(slab, stats.tensors).double().square().sum(1)
    bias = _bias(stats, slab)
    return square if bias is None else square + bias.square()


def _value_norms(stats: Statistics) -> Tensor:
    """Return the squared norm of the value layer's row, bias included, for each input of the output projection (a)."""
    module = stats.module
    total = torch.zeros(module.units * module.size, dtype=torch.float64, device=stats.weight_ao.device)
    for leaf in ("weight", "bias"):
        # Values are the last of queries, keys and values.
        slab = next((slab for slab in reversed(module.input_projections) if slab.name.endswith(leaf)), None)
        if slab is None:
            continue
        rows = rows_of(slab, stats.tensors).double()
        # If one layer computes a head's keys and values, the values come last.
        norms = rows.square().view(slab.units, slab.size, -1).sum(2)[:, -module.size :]
        heads_per_group = module.units // slab.units
        total += norms.repeat_interleave(heads_per_group, dim=0).flatten()
    return total


def _mean_square(stats: Statistics, slab: Slab) -> Tensor:
    """Return E[(A_j x + b_j)^2] for the rows j of one input projection (a)."""
    assert stats.input_moments is not None
    rows_ad = rows_of(slab, stats.tensors)
    count = max(stats.input_moments.count, 1)
    mean_square = ((rows_ad @ stats.input_moments.gram()) * rows_ad).sum(1).double() / count
    bias = _bias(stats, slab)
    if bias is None:
        return mean_square
    return mean_square + 2 * bias * (rows_ad.double() @ stats.input_moments.mean_a) + bias.square()


def _bias(stats: Statistics, slab: Slab) -> Tensor | None:
    """Return the bias of an input projection's rows (a); None if the layer has none."""
    if slab.bias not in stats.tensors:
        return None
    return rows_of(replace(slab, name=slab.bias, axis=0), stats.tensors).double()
