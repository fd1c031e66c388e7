"""Heads that attend alike: of every two, one can go (Greedy Output Approximation, criterion A, Algorithm 2).

A criterion that scores units one by one can follow it: heads that resemble another one then leave first, and the rest
by score. Alone, it knows no order but that of the heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.criteria.statistics import Statistics


def candidates(distances_hh: Tensor, tau: float) -> tuple[int, ...]:
    """Heads that can go, ascending.

    Algorithm 2: for all pairs (i, j), i outer and j inner, i != j: if the two are closer than tau and neither is a
    candidate yet, i becomes one. So of a similar pair the lower index goes, and the last of a group stays.

    Args:
        distances_hh: between the heads of one module (h x h).
        tau: the threshold, in the distances' unit.
    """
    near = distances_hh < tau
    near.fill_diagonal_(False)
    free = torch.ones(len(near), dtype=torch.bool)
    for i in range(len(near)):
        # Only i can have become a candidate while its row is gone through, and that ends the row.
        free[i] = not bool((near[i] & free).any())
    return tuple((~free).nonzero()[:, 0].tolist())


def scores(stats: Statistics) -> Tensor:
    """Score per unit (units): none is worth more than another; `similar_first` puts the similar ones in front."""
    return torch.ones(stats.module.units, dtype=torch.float64)


def similar_first(scores: Tensor, stats: Statistics) -> Tensor:
    """Scores (units) by which similar heads, and groups with more of them, leave before all others."""
    if not stats.similar:
        return scores
    similar = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    similar[list(stats.similar)] = True
    # More than all other scores of a group can differ by.
    step = 2 * stats.module.per_group * float(scores.max() - scores.min()) or 1.0
    return torch.where(similar, scores - step, scores)
