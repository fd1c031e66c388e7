"""Greedy elimination of a level-2 layer's inputs: structured optimal brain surgeon.

With P the inverse of the penalised matrix (`secateur.numerics.ridge`) over the units still there, removing the set S
raises the minimum by tr(W_S' P_SS^-1 W_S), changes W by -P[:,S] P_SS^-1 W_S, and P by -P[:,S] P_SS^-1 P[S,:]. One pass
orders all units and gives the error at every width. The changes of P are kept as thin factors and subtracted several
steps at a time: P is far larger than the caches, so that reading it takes as long as the products do.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur.numerics.moments import panel_width
from secateur.numerics.ridge import NormalEquations, factorise, factorise_each, invert

STEP = 64
"""Most units that leave at once; candidates are twice as many."""
RANK = 512
"""Entries that leave between two updates of the inverse, at least."""


@dataclass
class Elimination:
    """What greedy elimination found, unit by unit."""

    order: Tensor
    """Units in the order in which they left (int64)."""
    increases: Tensor
    """Rise of the penalised minimum by each of them (float64)."""
    errors: Tensor
    """||XW - T||^2 after the best refit with 0, 1, 2, ... of them gone (float64, one longer); NaN if not asked."""
    weights: dict[int, Tensor]
    """Where asked, by how many are gone: the refitted weights of the entries still there (float32)."""


def eliminate(
    normal: NormalEquations,
    size: int,
    *,
    stop: int = 1,
    groups: int | None = None,
    order: Tensor | None = None,
    with_errors: bool = True,
    weights_at: Collection[int] = (),
) -> Elimination:
    """Remove units one after the other, those first whose loss the others make up best.

    Args:
        normal: the penalised system; its inputs are `units * size` entries.
        size: entries per unit.
        stop: units that stay (per group, if `groups` is given).
        groups: if given, every step removes one unit from each of that many equal runs of units.
        order: if given, remove in this order instead of the cheapest first.
        with_errors: work out the error at every width; where only the order is wanted, that is work for nothing.
        weights_at: give the weights where so many units are gone.
    """
    units = normal.scale_a.shape[0] // size
    state = _State(normal, size)
    removed = [torch.empty(0, dtype=torch.int64)]
    increases = [torch.empty(0, dtype=torch.float64)]
    errors = [torch.tensor([normal.error(state.weight)], dtype=torch.float64)]
    goal = units - stop * (groups or 1)
    weights: dict[int, Tensor] = {}
    gone = 0
    while gone < goal:
        ahead = min(cut for cut in (*weights_at, goal) if cut > gone) - gone
        step = min(max(1, min(STEP, units // 32)), ahead)
        if order is not None:
            step = groups or step
            chosen = state.positions(order[gone : gone + step])
        elif groups is not None:
            chosen = state.cheapest_of_groups(groups, units // groups)
        else:
            chosen = state.cheapest(step)
        removed.append(state.units[chosen].cpu())
        rise, change = state.remove(chosen, with_errors)
        increases.append(rise.cpu())
        errors.append(errors[-1][-1] + change.cpu())
        gone += len(chosen)
        if gone in weights_at:
            weights[gone] = normal.unscaled(*state.left())
    return Elimination(torch.cat(removed), torch.cat(increases), torch.cat(errors), weights)


class _State:
    """The inverse and the weights over the units still there, compacted as units leave."""

    def __init__(self, normal: NormalEquations, size: int):
        self.size = size
        self.inverse = invert(normal.matrix_aa.clone())
        """As it was before the removals in `pending`."""
        self.pending = self.inverse.new_zeros(0, len(self.inverse))
        """R (r x a): the inverse is now `inverse - R'R`."""
        self.weight = normal.scaled_old() if normal.own else self.inverse @ normal.right_ao
        self.linear = normal.right_ao - 2 * normal.cross_ao
        self.penalty = normal.penalty_a
        self.units = torch.arange(len(self.inverse) // size, device=self.inverse.device)
        self.alive = torch.ones_like(self.units, dtype=torch.bool)

    def entries(self, positions: Tensor) -> Tensor:
        """Matrix entries of the units at these positions."""
        return (positions[:, None] * self.size + torch.arange(self.size, device=positions.device)).reshape(-1)

    def positions(self, units: Tensor) -> Tensor:
        """Where these units stand now."""
        return torch.searchsorted(self.units, units.to(self.units.device))

    def costs(self) -> Tensor:
        """tr(W_S' P_SS^-1 W_S) of every unit on its own; infinite where it has left."""
        count, size = len(self.units), self.size
        weight = self.weight.view(count, size, -1)
        if size == 1:
            norms = torch.linalg.vector_norm(self.weight, dim=1)
            diagonal = self.inverse.diagonal() - torch.linalg.vector_norm(self.pending, dim=0).square()
            cost = norms.square() / diagonal.clamp_min(torch.finfo(weight.dtype).tiny)
        else:
            blocks = self.inverse.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
            blocks[~self.alive] = torch.eye(size, dtype=blocks.dtype, device=blocks.device)
            cost = torch.linalg.solve_triangular(factorise_each(blocks), weight, upper=False).square().sum((1, 2))
        return cost.masked_fill(~self.alive, float("inf"))

    def cheapest(self, step: int) -> Tensor:
        """The next `step` units: greedy one by one among the cheapest 2 * step, each after the ones before it."""
        costs = self.costs()
        if step == 1:
            return costs.argmin()[None]
        pool = costs.topk(min(2 * step, int(self.alive.sum())), largest=False).indices
        if self.size > 1:
            return pool[:step]
        # Rank-one updates on the pool alone: its block of P, and the Gram matrix of its weight rows. Tiny matrices are
        # numpy's, which calls a loop in a third of the time.
        block = self.rows(pool, pool).double().cpu().numpy()
        rows = self.weight[pool].double()
        gram = (rows @ rows.T).cpu().numpy()
        left = np.zeros(len(pool))
        chosen = []
        for _ in range(step):
            index = int((gram.diagonal() / block.diagonal() + left).argmin())
            chosen.append(index)
            ratio = block[:, index] / block[index, index]
            change = np.outer(ratio, gram[index] - 0.5 * gram[index, index] * ratio)
            gram -= change
            gram -= change.T
            block -= np.outer(ratio, block[index])
            block[index, index] = 1.0
            left[index] = np.inf
        return pool[torch.tensor(chosen, device=pool.device)]

    def cheapest_of_groups(self, groups: int, per_group: int) -> Tensor:
        """The cheapest unit of every group."""
        costs = self.costs()
        owner = self.units // per_group
        return torch.stack([costs.masked_fill(owner != group, float("inf")).argmin() for group in range(groups)])

    def rows(self, at: Tensor, columns: Tensor | slice = slice(None)) -> Tensor:
        """Rows of the inverse as it is now, or some columns of them."""
        rows = self.inverse[at][:, columns]
        return rows.addmm_(self.pending[:, at].T, self.pending[:, columns], alpha=-1) if len(self.pending) else rows

    def remove(self, positions: Tensor, with_errors: bool) -> tuple[Tensor, Tensor]:
        """Take units out in this order; the rise of the minimum and the running change of the error, each."""
        at = self.entries(positions)
        rows = self.rows(at)
        factor = factorise(rows[:, at])
        # Rows of `reach` and of `lost`: one rank-one update an entry, in order of removal.
        reach = torch.linalg.solve_triangular(factor, rows, upper=False)
        lost = torch.linalg.solve_triangular(factor, self.weight[at], upper=False)
        rise = lost.square().sum(1, dtype=torch.float64)
        change = self._error_changes(reach, lost) if with_errors else torch.full_like(rise, torch.nan)
        self.weight.addmm_(reach.T, lost, alpha=-1)
        self.pending = torch.cat([self.pending, reach])
        self.weight[at] = 0
        self.alive[positions] = False
        shrink = int(self.alive.sum()) < 0.85 * len(self.alive)
        if shrink or self.size > 1 or len(self.pending) >= RANK:
            self._settle()
        if shrink:
            self._compact()
        return rise.view(-1, self.size).sum(1), change.view(-1, self.size)[:, -1]

    def _error_changes(self, reach: Tensor, lost: Tensor) -> Tensor:
        """Change of ||XW - T||^2 (no penalty) after each entry of one removal, from the first on."""
        # error(W) = energy + <W, linear> - <W, penalty W>, at W - reach[:t]' lost[:t] for t = 1, 2, ...
        # Two products: what is as large as W is read and not made anew.
        pulled = self.penalty * reach
        slope = ((reach @ self.linear - 2 * pulled @ self.weight) * lost).sum(1)
        curve = ((pulled @ reach.T) * (lost @ lost.T)).double()
        return -slope.double().cumsum(0) - curve.cumsum(0).cumsum(1).diagonal()

    def left(self) -> tuple[Tensor, Tensor]:
        """Weights of the entries still there, and which these are."""
        here = self.alive.nonzero()[:, 0]
        return self.weight[self.entries(here)], self.entries(self.units[here])

    def _settle(self) -> None:
        """Update the inverse by the removals so far; panels leave out most of what is there twice."""
        a, panel = len(self.inverse), panel_width(len(self.inverse))
        for start in range(0, a, panel):
            stop = start + panel
            self.inverse[start:stop, start:].addmm_(self.pending[:, start:stop].T, self.pending[:, start:], alpha=-1)
            self.inverse[stop:, start:stop] = self.inverse[start:stop, stop:].T
        self.pending = self.pending[:0]

    def _compact(self) -> None:
        keep = self.alive.nonzero()[:, 0]
        at = self.entries(keep)
        self.inverse, self.pending = self.inverse.index_select(0, at).index_select(1, at), self.pending[:, at]
        self.weight, self.linear, self.penalty = self.weight[at], self.linear[at], self.penalty[at]
        self.units, self.alive = self.units[keep], self.alive[keep]
