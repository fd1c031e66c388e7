"""Heads that attend alike: of every two, one can go (Greedy Output Approximation, criterion A, Algorithm 2).

Alone, the criterion gives a plan with exact heads (`secateur.paper.similar_heads`). In front of a criterion that scores
or ranks units, heads that resemble another one leave first, and the rest by that criterion.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.base.errors import SecateurError


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


@dataclass(frozen=True)
class SimilarHeads:
    """Similar heads of the chosen blocks."""

    name = "similarity"

    tau: float
    """Two heads closer than it are similar."""
    range: tuple[float, float]
    """The least and the largest distance between two heads of a block."""
    candidates: dict[int, tuple[int, ...]]
    """Heads of each block that resemble another one."""
    removed: dict[int, tuple[int, ...]] | None = None
    """The heads that go, where similarity alone decides: as many candidates as leave whole groups, or equal ones."""
    share: float | None = None
    """Of the chosen blocks' attention parameters, what goes with them."""

    def as_dict(self) -> dict[str, Any]:
        """For the record of a run."""
        record: dict[str, Any] = {"tau": self.tau, "distances": list(self.range), "attention_share": self.share}
        blocks = []
        for index, heads in self.candidates.items():
            removed = {} if self.removed is None else {"removed": list(self.removed[index])}
            blocks.append({"block": index, "candidates": list(heads), **removed})
        return record | {"blocks": blocks}

    def describe(self) -> str:
        """One clause for people."""
        found = sum(map(len, self.candidates.values()))
        what = f"tau {self.tau:.4g} finds {found} similar heads (distances {self.range[0]:.3g} to {self.range[1]:.3g})"
        if self.removed is None:
            return f"{what}; in each module they go first"
        gone = sum(map(len, self.removed.values()))
        which = "all" if gone == found else f"{gone} in whole key/value groups, or as many of every group,"
        return f"{what}; {which} go, {self.share:.1%} of the attention's parameters"


def find_similar_heads(distances: Mapping[int, Tensor], tau: float) -> SimilarHeads:
    """The similar heads of every block.

    Args:
        distances: of each block's heads (h x h).

    Raises:
        SecateurError: no heads are similar, or all are.
    """
    pairs = torch.cat([table[torch.ones_like(table, dtype=torch.bool).triu(1)] for table in distances.values()])
    least, largest = float(pairs.min()), float(pairs.max())
    if tau <= least:
        raise SecateurError(
            f"tau is {tau:g}, which removes nothing: the distances between heads go from {least:.3g} to {largest:.3g}; "
            f"take more than {_rounded(least, math.ceil)}"
        )
    near = {index: candidates(table, tau) for index, table in distances.items()}
    # Algorithm 2 leaves at least one.
    if all(len(heads) == len(distances[index]) - 1 for index, heads in near.items()):
        less = "a smaller one" if tau <= largest else f"less than {_rounded(largest, math.floor)}"
        raise SecateurError(
            f"tau is {tau:g}, which leaves each block a single head: the distances between heads go from {least:.3g} "
            f"to {largest:.3g}; take {less}"
        )
    return SimilarHeads(tau, (least, largest), near)


def _rounded(value: float, way: Callable[[float], int]) -> str:
    """A short number that is surely no smaller, or no larger."""
    return f"{way(value * 1e4) / 1e4:g}"
