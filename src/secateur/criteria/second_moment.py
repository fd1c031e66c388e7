"""Second moment of a unit's contribution to the module's output (Greedy Output Approximation, criterion B).

For y = B act(A x) with uncentred covariance S of x, channel j is worth 1/2 ||B[:, j]||^2 (A_j S A_j').
A bias of level 1 counts as one more input that is always one.

Gated modules are two such modules, (up, down) and (gate, down); a channel's score is the product of both.
In attention the probabilities are folded into the input, X^ = softmax(..) X, so that A is the value layer
and A_j S^ A_j' is the mean square of level-2 input j itself; a head's score is the sum over its inputs.

S comes from the rows that the statistics were taken of: calibration text, or random token ids. Without any, S is I,
for X^ as for x, and the mean of both is zero.
"""

import torch
from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.criteria.statistics import Statistics
from secateur.model.structure import Slab


@criterion("second-moment", inputs=True)
def scores(stats: Statistics) -> Tensor:
    """Score per unit (units); higher = keep."""
    half_norm = 0.5 * stats.weight_ao.double().square().sum(1)
    if stats.module.kind == "heads":
        return stats.per_unit(half_norm * stats.moments.mean_square_a())
    result = torch.ones_like(half_norm)
    for slab in stats.module.scored:
        result = result * half_norm * _mean_square(stats, slab)
    return result


@criterion("second-moment-identity")
def identity(stats: Statistics) -> Tensor:
    """The same with S = I, from weights alone: A_j S A_j' is then ||A_j||^2, and b_j^2 more with a bias."""
    half_norm = 0.5 * stats.weight_ao.double().square().sum(1)
    if stats.module.kind == "heads":
        return stats.per_unit(half_norm * _value_norms(stats))
    result = torch.ones_like(half_norm)
    for slab in stats.module.scored:
        start, stop = slab.span
        square = stats.tensors[slab.name].movedim(slab.axis, 0)[start:stop].double().square().sum(1)
        bias = stats.tensors.get(slab.bias)
        result = result * half_norm * (square if bias is None else square + bias[start:stop].double().square())
    return result


def _value_norms(stats: Statistics) -> Tensor:
    """Squared norm of the value layer's row, bias included, behind each level-2 input (a)."""
    module = stats.module
    total = torch.zeros(module.units * module.size, dtype=torch.float64, device=stats.weight_ao.device)
    for leaf in ("weight", "bias"):
        # The values come last: of the slabs, or inside each unit where one slab holds all three layers.
        slab = next((slab for slab in reversed(module.level1) if slab.name.endswith(leaf)), None)
        if slab is None:
            continue
        start, stop = slab.span
        rows = stats.tensors[slab.name].movedim(slab.axis, 0)[start:stop].double().reshape(stop - start, -1)
        norms = rows.square().sum(1).view(slab.units, slab.size)[:, -module.size :]
        shared = module.per_group if slab.unit == "group" else 1
        total += norms.repeat_interleave(shared, dim=0).flatten()
    return total


def _mean_square(stats: Statistics, slab: Slab) -> Tensor:
    """E[(A_j x + b_j)^2] of one level-1 layer's rows."""
    assert stats.inputs is not None
    start, stop = slab.span
    rows = stats.tensors[slab.name].movedim(slab.axis, 0)[start:stop]
    count = max(stats.inputs.count, 1)
    mean_square = ((rows @ stats.inputs.gram()) * rows).sum(1).double() / count
    bias = stats.tensors.get(slab.bias)
    if bias is None:
        return mean_square
    b = bias[start:stop].double()
    return mean_square + 2 * b * (rows.double() @ stats.inputs.mean_a) + b.square()
