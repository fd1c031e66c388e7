"""Similar heads: of two heads with similar attention, one can be removed (criterion A and Algorithm 2 of the paper).

Alone, the criterion gives a plan that lists the heads to keep (`secateur.paper.similar_heads`). Before another
criterion, heads that are similar to another head are removed first, and further units by that criterion.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.base.errors import SecateurError


def candidates(distances_hh: Tensor, tau: float) -> tuple[int, ...]:
    """Return the heads that can be removed, in ascending order.

    Algorithm 2 of the paper visits all pairs (i, j) with i != j, with i in the outer and j in the inner loop. If the
    distance of a pair is below tau and neither head is a candidate yet, i becomes a candidate. So the lower index of a
    similar pair is removed, and the last head of a group of similar heads stays.

    Args:
        distances_hh: Distances between the heads of one module (heads x heads).
        tau: Threshold in the unit of the distances.
    """
    near = distances_hh < tau
    near.fill_diagonal_(False)
    free = torch.ones(len(near), dtype=torch.bool)
    for i in range(len(near)):
        # While row i is processed only i itself can become a candidate, and that ends the row.
        free[i] = not bool((near[i] & free).any())
    return tuple((~free).nonzero()[:, 0].tolist())


@dataclass(frozen=True)
class SimilarHeads:
    """Similar heads of the pruned blocks."""

    name = "similarity"

    tau: float
    """Distance in nats below which two heads are similar."""
    range: tuple[float, float]
    """Smallest and largest distance between two heads of a block."""
    candidates: dict[int, tuple[int, ...]]
    """Heads of each block that are similar to another one."""
    removed: dict[int, tuple[int, ...]] | None = None
    """Heads of each block that are removed, where similarity alone decides; they leave KV groups of equal size."""
    share: float | None = None
    """Share of the attention parameters of the pruned blocks that these heads have."""

    def as_dict(self) -> dict[str, Any]:
        """Return the contents for the record of a run."""
        record: dict[str, Any] = {"tau": self.tau, "distances": list(self.range), "attention_share": self.share}
        blocks = []
        for index, heads in self.candidates.items():
            removed = {} if self.removed is None else {"removed": list(self.removed[index])}
            blocks.append({"block": index, "candidates": list(heads), **removed})
        return record | {"blocks": blocks}

    def describe(self) -> str:
        """Return a clause about the number of similar heads."""
        found = sum(map(len, self.candidates.values()))
        what = f"tau {self.tau:.4g} finds {found} similar heads (distances {self.range[0]:.3g} to {self.range[1]:.3g})"
        if self.removed is None:
            return f"{what}; they are the first to be removed from each module"
        gone = sum(map(len, self.removed.values()))
        which = "all" if gone == found else f"{gone} (whole KV groups, or equally many of each group)"
        return f"{what}; {which} are removed, {self.share:.1%} of the attention's parameters"


def find_similar_heads(distances: Mapping[int, Tensor], tau: float) -> SimilarHeads:
    """Return the similar heads of every block.

    Args:
        distances: Distances between the heads of each block (heads x heads).
        tau: Threshold in the unit of the distances.

    Raises:
        SecateurError: No heads are similar, or all are.
    """
    pairs = torch.cat([table[torch.ones_like(table, dtype=torch.bool).triu(1)] for table in distances.values()])
    least, largest = float(pairs.min()), float(pairs.max())
    if tau <= least:
        raise SecateurError(
            f"tau is {tau:g}, which removes nothing: the distances between heads go from {least:.3g} to {largest:.3g}; "
            f"choose a tau above {_rounded(least, math.ceil)}"
        )
    near = {index: candidates(table, tau) for index, table in distances.items()}
    # Algorithm 2 keeps at least one head.
    if all(len(heads) == len(distances[index]) - 1 for index, heads in near.items()):
        less = "a smaller tau" if tau <= largest else f"a tau below {_rounded(largest, math.floor)}"
        raise SecateurError(
            f"tau is {tau:g}, which leaves each block a single head: the distances between heads go from {least:.3g} "
            f"to {largest:.3g}; choose {less}"
        )
    return SimilarHeads(tau, (least, largest), near)


def _rounded(value: float, way: Callable[[float], int]) -> str:
    """Return a number with four decimals as text, rounded up or down by `way`."""
    return f"{way(value * 1e4) / 1e4:g}"
