"""Ridge least squares for a level-2 layer.

The refit of a kept set K minimises, over W (a x o),

    ||X_K W_K - T||^2 + ridge * sum_j diag(H)_j ||W_j - W_old,j||^2,      H = X'X,  C = X'T,

whose solution is (H + ridge diag H)_KK W_K = C_K + ridge diag(H)_K W_old,K. All work happens in coordinates
where diag H is one: the penalised matrix then has eigenvalues between `ridge` and the number of inputs, so
that float32 is exact enough unless the ridge is tiny.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.numerics.moments import PANEL, panel_width

FLOAT32_RIDGE = 0.03
"""Below this ridge the condition number asks for float64."""
ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Times the root of the number of inputs: what rounding makes of an eigenvalue of zero, where diag H is one."""


@dataclass
class NormalEquations:
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
    own: bool
    """The target is what the old weights yield, so that these are the minimiser."""

    def scaled_old(self) -> Tensor:
        """The old weights in these coordinates; zero where an input is always zero."""
        return (self.scale_a[:, None] * self.old_ao).masked_fill(self.dead_a[:, None], 0.0)

    def unscaled(self, weight_ao: Tensor, keep: Tensor) -> Tensor:
        """Weights of some inputs as they are stored; of inputs that are always zero, the old ones."""
        dead = self.dead_a[keep, None]
        return torch.where(dead, self.old_ao[keep], weight_ao / self.scale_a[keep, None]).float()

    def among(self, keep: Tensor) -> Tensor:
        """The matrix of some inputs (len(keep) x len(keep)), panel by panel: what goes is not copied first."""
        result = self.matrix_aa.new_empty(len(keep), len(keep))
        for rows, part in zip(keep.split(PANEL), result.split(PANEL), strict=True):
            torch.index_select(self.matrix_aa[rows], 1, keep, out=part)
        return result

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
) -> NormalEquations:
    """Set up the penalised system of one layer.

    Args:
        gram_aa: X'X; of centred rows if an intercept is to be fitted.
        cross_ao: X'T; None if the target is what `old_ao` itself yields, so that X'T = X'X W_old.
        energy: ||T||^2; not used where `cross_ao` is None.
        old_ao: the dense weight, inner axis first.
        ridge: strength of the pull to the old weights, relative to each input's own energy.
        overwrite: use the memory of `gram_aa` and `cross_ao` for the result.
    """
    dtype = torch.float32 if ridge >= FLOAT32_RIDGE else torch.float64
    matrix = gram_aa.to(dtype, copy=not overwrite)
    old = old_ao.to(dtype)
    diagonal = matrix.diagonal().clone()
    # Of a ten millionth of the others' size; not of a thousandth, as next to a massive activation all others are.
    dead = diagonal <= diagonal.mean() * torch.finfo(torch.float32).eps ** 2
    scale = torch.where(dead, torch.ones_like(diagonal), diagonal).sqrt()
    penalty = torch.where(dead, torch.ones_like(diagonal), torch.full_like(diagonal, ridge))
    matrix /= scale[:, None]
    matrix /= scale[None, :]
    scaled_old = (scale[:, None] * old).masked_fill(dead[:, None], 0.0)
    if cross_ao is None:
        cross = matrix @ scaled_old
        energy = float((cross * scaled_old).sum(1).double().sum())
    else:
        cross = cross_ao.to(dtype, copy=not overwrite).div_(scale[:, None])
    matrix.diagonal().add_(penalty)
    right = cross + penalty[:, None] * scaled_old
    return NormalEquations(matrix, cross, right, scale, penalty, dead, old, energy, own=cross_ao is None)


def least_squares(normal: NormalEquations, keep: Tensor) -> tuple[Tensor, float]:
    """Best weights of the kept inputs (len(keep) x o) and ||XW - T||^2, the penalty left out."""
    weight = _solve(normal.among(keep), normal.right_ao[keep], normal.scaled_old()[keep])
    full = torch.zeros_like(normal.right_ao)
    full[keep] = weight
    return normal.unscaled(weight, keep), _not_below_zero(normal.error(full))


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


def residual(normal: NormalEquations, weight_ao: Tensor, keep: Tensor) -> float:
    """||X_K W - T||^2 of any weights of the kept inputs, also of ones that no refit gave."""
    scaled = normal.scale_a[keep, None] * weight_ao.to(normal.scale_a.dtype)
    product = normal.among(keep) @ scaled - normal.penalty_a[keep, None] * scaled
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
    """Inverse of a positive definite matrix, in its place; one panel more is in memory.

    The sweep operator panel by panel: with the pivot block A_kk, rows A_k become A_kk^-1 A_k, and all others
    A_ij - A_ik A_kk^-1 A_kj; once every block was the pivot, the negative inverse is left. Panels on and above the
    diagonal are enough: 1.2 a^3 flops.
    """
    a, panel = len(matrix_aa), panel_width(len(matrix_aa))
    for start in range(0, a, panel):
        stop = min(start + panel, a)
        pivot = torch.cat([matrix_aa[:start, start:stop].T, matrix_aa[start:stop, start:]], 1)
        factor = factorise(pivot[:, start:stop])
        swept = torch.cholesky_solve(pivot, factor)
        swept[:, start:stop] = -torch.cholesky_solve(
            torch.eye(stop - start, dtype=factor.dtype, device=factor.device), factor
        )
        for first in range(0, a, panel):
            if first != start:
                rows = slice(first, first + panel)
                matrix_aa[rows, first:].addmm_(pivot[:, rows].T, swept[:, first:], alpha=-1)
        matrix_aa[:start, start:stop] = swept[:, :start].T
        matrix_aa[start:stop, start:] = swept[:, start:]
    for start in range(0, a, panel):
        stop = min(start + panel, a)
        matrix_aa[start:stop, start:].neg_()
        matrix_aa[stop:, start:stop] = matrix_aa[start:stop, stop:].T
    return matrix_aa


def factorise_each(blocks: Tensor) -> Tensor:
    """Lower Cholesky factors of a batch of small matrices; those that rounding left indefinite get a jitter."""
    factor, failed = torch.linalg.cholesky_ex(blocks)
    for index in failed.nonzero()[:, 0].tolist():
        factor[index] = factorise(blocks[index])
    return factor
