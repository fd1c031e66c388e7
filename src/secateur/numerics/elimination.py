"""Greedy elimination of a level-2 layer's inputs: structured optimal brain surgeon.

With P the inverse of the penalised matrix (`secateur.numerics.ridge`) over the units still there, removing the set S
raises the minimum by tr(W_S' P_SS^-1 W_S), changes W by -P[:,S] P_SS^-1 W_S, and P by -P[:,S] P_SS^-1 P[S,:]. One pass
orders all units and prices every width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.numerics.ridge import Normal, factorise, factorise_each, invert

STEP = 64
"""Most units removed by one update of the inverse; candidates are twice as many."""


@dataclass
class Elimination:
    """What greedy elimination found, unit by unit."""

    order: Tensor
    """Units in the order in which they left (int64)."""
    increases: Tensor
    """Rise of the penalised minimum by each of them (float64)."""
    errors: Tensor
    """||XW - T||^2 after the best refit with 0, 1, 2, ... of them gone (float64, one longer); NaN if not asked."""


def eliminate(
    normal: Normal,
    size: int,
    *,
    stop: int = 1,
    groups: int | None = None,
    order: Tensor | None = None,
    prices: bool = True,
) -> Elimination:
    """Remove units one after the other, those first whose loss the others make up best.

    Args:
        normal: the penalised system; its inputs are `units * size` entries.
        size: entries per unit.
        stop: units that stay (per group, if `groups` is given).
        groups: if given, every step removes one unit from each of that many equal runs of units.
        order: if given, remove in this order instead of the cheapest first.
        prices: work out the error at every width; where only the order is wanted, that is a third of the time.
    """
    units = normal.scale_a.shape[0] // size
    inverse = invert(normal.matrix_aa)
    state = _State(normal, inverse, size)
    removed: list[Tensor] = []
    increases: list[Tensor] = []
    errors: list[Tensor] = [torch.tensor([normal.error(state.weight)], dtype=torch.float64)]
    goal = units - stop * (groups or 1)
    gone = 0
    while gone < goal:
        step = min(max(1, min(STEP, units // 32)), goal - gone)
        if order is not None:
            step = groups or step
            chosen = state.positions(order[gone : gone + step])
        elif groups is not None:
            chosen = state.cheapest_of_groups(groups, units // groups)
        else:
            chosen = state.cheapest(step)
        removed.append(state.units[chosen].cpu())
        rise, change = state.remove(chosen, prices)
        increases.append(rise.cpu())
        errors.append(errors[-1][-1] + change.cpu())
        gone += len(chosen)
    if not removed:
        empty = torch.empty(0)
        return Elimination(empty.long(), empty.double(), errors[0])
    return Elimination(torch.cat(removed), torch.cat(increases), torch.cat(errors))


class _State:
    """The inverse and the weights over the units still there, compacted as units leave."""

    def __init__(self, normal: Normal, inverse: Tensor, size: int):
        self.size = size
        self.inverse = inverse
        self.weight = inverse @ normal.right_ao
        self.linear = normal.right_ao - 2 * normal.cross_ao
        self.penalty = normal.penalty_a
        self.units = torch.arange(inverse.shape[0] // size, device=inverse.device)
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
            cost = norms.square() / self.inverse.diagonal().clamp_min(torch.finfo(weight.dtype).tiny)
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
        # Rank-one updates on the pool alone: its block of P, and the Gram matrix of its weight rows.
        block = self.inverse[pool][:, pool].double()
        rows = self.weight[pool].double()
        gram = rows @ rows.T
        open_ = torch.zeros(len(pool), dtype=torch.float64, device=pool.device)
        chosen = []
        for _ in range(step):
            index = int((gram.diagonal() / block.diagonal() + open_).argmin())
            chosen.append(index)
            ratio = block[:, index] / block[index, index]
            row = gram[index].clone()
            gram -= torch.outer(ratio, row) + torch.outer(row, ratio) - torch.outer(ratio, ratio) * row[index]
            block -= torch.outer(ratio, block[index].clone())
            block[index, index] = 1.0
            open_[index] = float("inf")
        return pool[torch.tensor(chosen, device=pool.device)]

    def cheapest_of_groups(self, groups: int, per_group: int) -> Tensor:
        """The cheapest unit of every group."""
        costs = self.costs()
        owner = self.units // per_group
        return torch.stack([costs.masked_fill(owner != group, float("inf")).argmin() for group in range(groups)])

    def remove(self, positions: Tensor, prices: bool) -> tuple[Tensor, Tensor]:
        """Take units out in this order; the rise of the minimum and the running change of the error, each."""
        at = self.entries(positions)
        factor = factorise(self.inverse[at][:, at])
        # Columns of `reach` and rows of `lost`: one rank-one update of W an entry, in order of removal.
        reach = torch.linalg.solve_triangular(factor, self.inverse[at], upper=False).T
        lost = torch.linalg.solve_triangular(factor, self.weight[at], upper=False)
        rise = lost.square().sum(1, dtype=torch.float64)
        change = self._error_changes(reach, lost) if prices else torch.full_like(rise, torch.nan)
        self.weight.addmm_(reach, lost, alpha=-1)
        self.inverse.addmm_(reach, reach.T, alpha=-1)
        self.weight[at] = 0
        self.inverse[at] = 0
        self.inverse[:, at] = 0
        self.alive[positions] = False
        if int(self.alive.sum()) < 0.85 * len(self.alive):
            self._compact()
        return rise.view(-1, self.size).sum(1), change.view(-1, self.size)[:, -1]

    def _error_changes(self, reach: Tensor, lost: Tensor) -> Tensor:
        """Change of ||XW - T||^2 (no penalty) after each entry of one removal, from the first on."""
        # error(W) = energy + <W, linear> - <W, penalty W>, at W - reach[:, :t] lost[:t] for t = 1, 2, ...
        # Two products: what is as large as W is read and not made anew.
        pulled = self.penalty[:, None] * reach
        slope = ((reach.T @ self.linear - 2 * pulled.T @ self.weight) * lost).sum(1)
        curve = ((reach.T @ pulled) * (lost @ lost.T)).double()
        return -slope.double().cumsum(0) - curve.cumsum(0).cumsum(1).diagonal()

    def _compact(self) -> None:
        keep = self.alive.nonzero()[:, 0]
        at = self.entries(keep)
        self.inverse = self.inverse[at][:, at]
        self.weight, self.linear, self.penalty = self.weight[at], self.linear[at], self.penalty[at]
        self.units, self.alive = self.units[keep], self.alive[keep]
