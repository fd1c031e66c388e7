"""Ridge least squares for a level-2 layer, and the greedy elimination of its inputs.

The refit of a kept set K minimises, over W (a x o),

    ||X_K W_K - T||^2 + ridge * sum_j diag(H)_j ||W_j - W_old,j||^2,      H = X'X,  C = X'T,

whose solution is (H + ridge diag H)_KK W_K = C_K + ridge diag(H)_K W_old,K. All work happens in coordinates
where diag H is one: the penalised matrix then has eigenvalues between `ridge` and the number of inputs, so
that float32 is exact enough unless the ridge is tiny.

Elimination is structured optimal brain surgeon: with P the inverse of the penalised matrix over the units
still there, removing the set S raises the minimum by tr(W_S' P_SS^-1 W_S), changes W by
-P[:,S] P_SS^-1 W_S, and P by -P[:,S] P_SS^-1 P[S,:]. One pass orders all units and prices every width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT32_RIDGE = 0.03
"""Below this ridge the condition number asks for float64."""
ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Times the root of the number of inputs: what rounding makes of an eigenvalue of zero, where diag H is one."""
STEP = 64
"""Most units removed by one update of the inverse; candidates are twice as many."""


@dataclass
class Normal:
    """The penalised normal equations in unit-diagonal coordinates; `weight` there is `scale * W`."""

    matrix_aa: Tensor
    """D^-1 H D^-1 + diag(penalty), D = sqrt(diag H)."""
    cross_ao: Tensor
    """D^-1 C, without the penalty."""
    right_ao: Tensor
    """D^-1 C + penalty * D W_old."""
    scale_a: Tensor
    penalty_a: Tensor
    dead_a: Tensor
    """Inputs that are always zero: they cost nothing to remove, and keep their old weights where they stay."""
    old_ao: Tensor
    energy: float
    """||T||^2, of centred rows with an intercept."""

    def error(self, weight_ao: Tensor) -> float:
        """||X W - T||^2 without the penalty, at a minimiser `weight_ao` (scaled; zero rows where units are gone)."""
        linear = (weight_ao * (self.right_ao - 2 * self.cross_ao)).sum(1).double().sum()
        square = (self.penalty_a[:, None] * weight_ao.square()).sum(1).double().sum()
        return float(self.energy + linear - square)


def normal_equations(
    gram_aa: Tensor,
    cross_ao: Tensor | None,
    energy: float,
    old_ao: Tensor,
    ridge: float,
    *,
    overwrite: bool = False,
) -> Normal:
    """Set up the penalised system of one layer.

    Args:
        gram_aa: X'X; of centred rows if an intercept is to be fitted.
        cross_ao: X'T; None if the target is what `old_ao` itself yields, so that X'T = X'X W_old.
        energy: ||T||^2; not used where `cross_ao` is None.
        old_ao: the dense weight, inner axis first.
        ridge: strength of the pull to the old weights, relative to each input's own energy.
        overwrite: use the memory of `gram_aa` for the result.
    """
    dtype = torch.float32 if ridge >= FLOAT32_RIDGE else torch.float64
    matrix = gram_aa.to(dtype, copy=not overwrite)
    old = old_ao.to(dtype)
    diagonal = matrix.diagonal().clone()
    dead = diagonal <= diagonal.mean() * torch.finfo(torch.float32).eps
    scale = torch.where(dead, torch.ones_like(diagonal), diagonal).sqrt()
    penalty = torch.where(dead, torch.ones_like(diagonal), torch.full_like(diagonal, ridge))
    matrix /= scale[:, None]
    matrix /= scale[None, :]
    scaled_old = (scale[:, None] * old).masked_fill(dead[:, None], 0.0)
    if cross_ao is None:
        cross = matrix @ scaled_old
        energy = float((cross * scaled_old).sum(1).double().sum())
    else:
        cross = cross_ao.to(dtype) / scale[:, None]
    matrix.diagonal().add_(penalty)
    return Normal(matrix, cross, cross + penalty[:, None] * scaled_old, scale, penalty, dead, old, energy)


def refit(normal: Normal, keep: Tensor) -> tuple[Tensor, float]:
    """Best weights of the kept inputs (len(keep) x o) and ||XW - T||^2, the penalty left out."""
    old = (normal.scale_a[:, None] * normal.old_ao).masked_fill(normal.dead_a[:, None], 0.0)[keep]
    weight = _solve(normal.matrix_aa[:, keep][keep], normal.right_ao[keep], old)
    full = torch.zeros_like(normal.right_ao)
    full[keep] = weight
    fitted = torch.where(normal.dead_a[keep, None], normal.old_ao[keep], weight / normal.scale_a[keep, None])
    return fitted.float(), _not_below_zero(normal.error(full))


def _solve(matrix_aa: Tensor, right_ao: Tensor, old_ao: Tensor) -> Tensor:
    """The solution of matrix_aa W = right_ao; where it has many, the one nearest to `old_ao`.

    Without a ridge the matrix is singular where inputs depend on each other, as behind a LayerNorm, whose outputs sum
    to zero up to gain and bias. It is known to float32's precision only, so that eigenvalues below what rounding
    makes of zero say nothing: in their directions the old weights stay.
    """
    floor = ROUNDING * matrix_aa.shape[0] ** 0.5
    factor, failed = torch.linalg.cholesky_ex(matrix_aa)
    if not failed and _least_eigenvalue(factor) > floor:
        return torch.cholesky_solve(right_ao, factor)
    del factor
    if not torch.isfinite(matrix_aa.sum()):
        raise FloatingPointError("the normal equations are NaN or infinite; are activations finite?")
    values, vectors = torch.linalg.eigh(matrix_aa.double())
    inverse = torch.where(values > floor, 1 / values, 0.0)
    gap = (right_ao - matrix_aa @ old_ao).double()
    return old_ao + (vectors @ (inverse[:, None] * (vectors.T @ gap))).to(old_ao.dtype)


def _least_eigenvalue(factor_aa: Tensor) -> float:
    """The smallest eigenvalue of a matrix from its Cholesky factor, by inverse iteration; never too small.

    Infinite where no input is kept.
    """
    start = torch.randn(factor_aa.shape[0], 1, dtype=factor_aa.dtype, generator=torch.Generator().manual_seed(0))
    vector, size = start.to(factor_aa.device), 0.0
    for _ in range(4):
        vector = torch.cholesky_solve(vector / torch.linalg.vector_norm(vector), factor_aa)
        size = float(torch.linalg.vector_norm(vector))
    return 1 / size if size else float("inf")


def residual(normal: Normal, weight_ao: Tensor, keep: Tensor) -> float:
    """||X_K W - T||^2 of any weights of the kept inputs, also of ones that no refit gave."""
    scaled = normal.scale_a[keep, None] * weight_ao.to(normal.scale_a.dtype)
    product = normal.matrix_aa[:, keep][keep] @ scaled - normal.penalty_a[keep, None] * scaled
    return _not_below_zero(
        float(normal.energy + (scaled * (product - 2 * normal.cross_ao[keep])).sum(1).double().sum())
    )


def _not_below_zero(error: float) -> float:
    """An error as it can be: rounding may leave a perfect fit just below zero; NaN stays NaN."""
    return 0.0 if error < 0 else error


def factorise(matrix_aa: Tensor) -> Tensor:
    """Lower Cholesky factor; a matrix that rounding left indefinite gets the smallest jitter that mends it."""
    factor, failed = torch.linalg.cholesky_ex(matrix_aa)
    jitter = torch.finfo(matrix_aa.dtype).eps * matrix_aa.shape[0]
    while bool(failed):
        factor, failed = torch.linalg.cholesky_ex(matrix_aa + jitter * torch.diag_embed(matrix_aa.diagonal()))
        jitter *= 10
        if jitter > 1:
            raise FloatingPointError("the normal equations are not positive definite; are activations finite?")
    return factor


def invert(matrix_aa: Tensor) -> Tensor:
    """Inverse of a positive definite matrix, with two more of its size in memory.

    Not cholesky_inverse, with fewer flops: it was seen to run 30 times slower beside other busy processes.
    """
    factor = factorise(matrix_aa)
    inverse = torch.eye(matrix_aa.shape[0], dtype=matrix_aa.dtype, device=matrix_aa.device)
    torch.linalg.solve_triangular(factor, inverse, upper=False, out=inverse)
    del factor
    return inverse.T @ inverse


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
            cost = weight.square().sum((1, 2)) / self.inverse.diagonal().clamp_min(torch.finfo(weight.dtype).tiny)
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
        slope = ((reach.T @ (self.linear - 2 * self.penalty[:, None] * self.weight)) * lost).sum(1)
        curve = ((reach.T @ (self.penalty[:, None] * reach)) * (lost @ lost.T)).double()
        return -slope.double().cumsum(0) - curve.cumsum(0).cumsum(1).diagonal()

    def _compact(self) -> None:
        keep = self.alive.nonzero()[:, 0]
        at = self.entries(keep)
        self.inverse = self.inverse[at][:, at]
        self.weight, self.linear, self.penalty = self.weight[at], self.linear[at], self.penalty[at]
        self.units, self.alive = self.units[keep], self.alive[keep]


def factorise_each(blocks: Tensor) -> Tensor:
    """Lower Cholesky factors of a batch of small matrices; those that rounding left indefinite get a jitter."""
    factor, failed = torch.linalg.cholesky_ex(blocks)
    for index in failed.nonzero()[:, 0].tolist():
        factor[index] = factorise(blocks[index])
    return factor
