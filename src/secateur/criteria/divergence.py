"""How far the attention of two heads lies apart. A distance is a function of probability rows; here stands one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Distance = Callable[[Tensor], Tensor]
"""From the probability rows of a module's heads (h x n x k: heads, rows, keys) to the distances of all pairs, summed
over the rows (h x h, float64, symmetric, zero on the diagonal)."""


def jensen_shannon(probabilities_hnk: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats, a `Distance`.

    JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2, H the entropy; from Lin, 1991, *Divergence measures based on the
    Shannon entropy*.
    """
    heads = len(probabilities_hnk)
    own = _entropy(probabilities_hnk)
    sums = torch.zeros(heads, heads, dtype=torch.float64, device=probabilities_hnk.device)
    for i in range(heads - 1):
        middle = (probabilities_hnk[i + 1 :] + probabilities_hnk[i]).mul_(0.5)
        # Rounding can leave heads that agree just below zero.
        sums[i, i + 1 :] = (_entropy(middle) - (own[i + 1 :] + own[i]) / 2).clamp_min(0).sum(1)
    return sums + sums.T


def _entropy(rows_hnk: Tensor) -> Tensor:
    """Entropy of every row (h x n), float64; what has no probability adds nothing."""
    tiny = torch.finfo(rows_hnk.dtype).tiny
    return rows_hnk.clamp_min(tiny).log_().mul_(rows_hnk).sum(-1).double().neg_()
