"""Greedy elimination of an output projection's inputs: structured optimal brain surgeon.

With P the inverse of the penalised matrix over the units that are left (`secateur.numerics.ridge`) and W the refitted
weights, removing a set S of inputs

    raises the minimum by tr(W_S' P_SS^-1 W_S),   changes W by -P[:,S] P_SS^-1 W_S,   and P by -P[:,S] P_SS^-1 P[S,:].

One pass gives the order of all units and the error at every width. P is far larger than the processor's caches, so that
reading P takes as long as the products. Therefore changes of P are stored as thin factors and subtracted once for
several steps.

Shapes: u units that are left, s inputs per unit, a = u * s inputs, r removed inputs by which P is not yet updated, o
outputs.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur.numerics.panels import mirror_panel, panels
from secateur.numerics.ridge import NormalEquations, factorise, factorise_each, invert

STEP = 64
"""Largest number of units that are removed in one step; they are selected from twice as many candidates."""
RANK = 512
"""Number of removed inputs at which the inverse is updated."""
SHRINK = 0.85
"""Removed units are deleted from the tensors once fewer than this share of the units in the tensors is left."""


@dataclass
class Elimination:
    """Result of a greedy elimination, unit by unit."""

    order: Tensor
    """Units in the order of removal (int64)."""
    errors: Tensor
    """||XW - T||^2 after the best refit without the first 0, 1, 2, ... units (float64); NaN if not requested."""
    weights: dict[int, Tensor]
    """Refitted weights of the remaining inputs (float32), by the requested numbers of removed units."""


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
    """Remove units one after the other, always the one whose removal raises the minimum least.

    Args:
        normal: The penalised normal equations, whose inputs are units * size.
        size: Inputs per unit.
        stop: Number of units that are left (in each group, if `groups` is given).
        groups: Number of groups of consecutive units, if every step must remove one unit from each group.
        order: If given, the order of removal.
        with_errors: Whether to compute the error at every width.
        weights_at: Numbers of removed units at which the weights are returned.
    """
    units = len(normal.scale_a) // size
    state = _State(normal, size)
    steps = [torch.empty(0, dtype=torch.int64)]
    errors = [torch.tensor([normal.error(state.weight)], dtype=torch.float64)]
    weights: dict[int, Tensor] = {}
    removed, end = 0, units - stop * (groups or 1)
    while removed < end:
        until_stop = min(number for number in (*weights_at, end) if number > removed) - removed
        step = min(max(1, min(STEP, units // 32)), until_stop)
        if order is not None:
            positions = state.positions(order[removed : removed + (groups or step)])
        elif groups is not None:
            positions = state.cheapest_of_groups(groups, units // groups)
        else:
            positions = state.cheapest(step)
        steps.append(state.units[positions].cpu())
        errors.append(errors[-1][-1] + state.remove(positions, with_errors).cpu())
        removed += len(positions)
        if removed in weights_at:
            weights[removed] = normal.unscaled(*state.remaining())
    return Elimination(torch.cat(steps), torch.cat(errors), weights)


class _State:
    """Inverse and weights of the units that are left. Tensors shrink as units are removed.

    A position is a unit's place in these tensors.
    """

    def __init__(self, normal: NormalEquations, size: int):
        self.size = size
        self.inverse = invert(normal.matrix_aa.clone())
        """P before the removals in `pending`."""
        self.pending = self.inverse.new_zeros(0, len(self.inverse))
        """R (r x a), with P = inverse - R'R."""
        self.weight = normal.scaled_old() if normal.old_is_minimum else self.inverse @ normal.right_ao
        """W (a x o); rows of removed inputs are zero."""
        self.linear = normal.right_ao - 2 * normal.cross_ao
        self.penalty = normal.penalty_a
        self.units = torch.arange(len(self.inverse) // size, device=self.inverse.device)
        """Unit at each position, ascending."""
        self.alive = torch.ones_like(self.units, dtype=torch.bool)
        """Whether the unit at a position is left."""

    def entries(self, positions: Tensor) -> Tensor:
        """Return the inputs of the units at some positions."""
        return (positions[:, None] * self.size + torch.arange(self.size, device=positions.device)).reshape(-1)

    def positions(self, units: Tensor) -> Tensor:
        """Return the positions of some units."""
        return torch.searchsorted(self.units, units.to(self.units.device))

    def costs(self) -> Tensor:
        """Return tr(W_S' P_SS^-1 W_S) of every single unit; infinite for removed units."""
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
        """Return the positions of the next `step` units, chosen greedily among the 2 * step cheapest."""
        costs = self.costs()
        if step == 1:
            return costs.argmin()[None]
        pool = costs.topk(min(2 * step, int(self.alive.sum())), largest=False).indices
        return pool[:step] if self.size > 1 else pool[self._greedy(pool, step)]

    def _greedy(self, pool: Tensor, step: int) -> Tensor:
        """Return the places in the pool of `step` inputs, each the cheapest once those before it are removed."""
        # Rank-one updates of the pool's block of P and of the Gram matrix of its rows of W. NumPy runs a loop over
        # small matrices in a third of the time.
        block = self.rows(pool, pool).double().cpu().numpy()
        rows = self.weight[pool].double()
        gram = (rows @ rows.T).cpu().numpy()
        blocked, chosen = np.zeros(len(pool)), []
        for _ in range(step):
            index = int((gram.diagonal() / block.diagonal() + blocked).argmin())
            chosen.append(index)
            ratio = block[:, index] / block[index, index]
            change = np.outer(ratio, gram[index] - 0.5 * gram[index, index] * ratio)
            gram -= change
            gram -= change.T
            block -= np.outer(ratio, block[index])
            block[index, index] = 1.0
            blocked[index] = np.inf
        return torch.tensor(chosen, device=pool.device)

    def cheapest_of_groups(self, groups: int, per_group: int) -> Tensor:
        """Return the position of the cheapest unit of every group."""
        costs, group_of = self.costs(), self.units // per_group
        return torch.stack([costs.masked_fill(group_of != group, float("inf")).argmin() for group in range(groups)])

    def rows(self, at: Tensor, columns: Tensor | slice = slice(None)) -> Tensor:
        """Return rows of P, or some columns of these rows."""
        rows = self.inverse[at][:, columns]
        return rows.addmm_(self.pending[:, at].T, self.pending[:, columns], alpha=-1) if len(self.pending) else rows

    def remove(self, positions: Tensor, with_errors: bool) -> Tensor:
        """Remove units in the given order.

        Returns:
            For each unit, the change of the error since the start of this removal; NaN if not requested.
        """
        at = self.entries(positions)
        rows = self.rows(at)
        factor = factorise(rows[:, at])
        # Each row is a rank-one update, one per input in the order of removal: of P by r'r, of W by r'l.
        r_sa = torch.linalg.solve_triangular(factor, rows, upper=False)
        l_so = torch.linalg.solve_triangular(factor, self.weight[at], upper=False)
        nothing = torch.full((len(at),), torch.nan, dtype=torch.float64, device=at.device)
        change = self._error_changes(r_sa, l_so) if with_errors else nothing
        self.weight.addmm_(r_sa.T, l_so, alpha=-1)
        self.pending = torch.cat([self.pending, r_sa])
        self.weight[at] = 0
        self.alive[positions] = False
        shrink = int(self.alive.sum()) < SHRINK * len(self.alive)
        if shrink or self.size > 1 or len(self.pending) >= RANK:
            self._update_inverse()
        if shrink:
            self._shrink()
        return change.view(-1, self.size)[:, -1]

    def _error_changes(self, r_sa: Tensor, l_so: Tensor) -> Tensor:
        """Return the change of ||XW - T||^2 after each input of one removal (s)."""
        # error(W) = energy + <W, linear> - <W, penalty W>, at W - r[:t]' l[:t] for t = 1, 2, ... Both products read
        # tensors as large as W, but none of this size is made.
        penalised = self.penalty * r_sa
        slope = ((r_sa @ self.linear - 2 * penalised @ self.weight) * l_so).sum(1)
        curve = ((penalised @ r_sa.T) * (l_so @ l_so.T)).double()
        return -slope.double().cumsum(0) - curve.cumsum(0).cumsum(1).diagonal()

    def remaining(self) -> tuple[Tensor, Tensor]:
        """Return the weights of the inputs that are left, and which inputs these are."""
        positions = self.alive.nonzero()[:, 0]
        return self.weight[self.entries(positions)], self.entries(self.units[positions])

    def _update_inverse(self) -> None:
        """Subtract the pending removals from the inverse."""
        for start, stop in panels(len(self.inverse)):
            self.inverse[start:stop, start:].addmm_(self.pending[:, start:stop].T, self.pending[:, start:], alpha=-1)
            mirror_panel(self.inverse, start, stop)
        self.pending = self.pending[:0]

    def _shrink(self) -> None:
        """Delete removed units from all tensors."""
        keep = self.alive.nonzero()[:, 0]
        at = self.entries(keep)
        self.inverse, self.pending = self.inverse.index_select(0, at).index_select(1, at), self.pending[:, at]
        self.weight, self.linear, self.penalty = self.weight[at], self.linear[at], self.penalty[at]
        self.units, self.alive = self.units[keep], self.alive[keep]
