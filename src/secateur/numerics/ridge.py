"""Ridge least squares for an output projection, with a penalty toward the old weights.

For the kept inputs K, the refit minimises over W_K (k x o)

    ||X_K W_K - T||^2 + ridge * sum_j diag(H)_j ||W_j - W_old,j||^2,      H = X'X,  C = X'T,

with the solution (H + ridge diag H)_KK W_K = C_K + ridge diag(H)_K W_old,K. All equations are in unit-diagonal
coordinates, scale_a = sqrt(diag H), in which the diagonal of H is one. The eigenvalues of the penalised matrix then lie
between `ridge` and the number of inputs. Float32 is exact enough unless the ridge is tiny.

Shapes: a inputs, k kept inputs, o outputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.numerics.panels import PANEL, mirror_panel, panel_rows, panels

FLOAT32_RIDGE = 0.03
"""Smallest ridge at which float32 suffices; smaller ones need float64, because of the condition number."""
ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Size that an eigenvalue of zero can have because of rounding, divided by the square root of the number of inputs, in
unit-diagonal coordinates."""


@dataclass
class NormalEquations:
    """Penalised normal equations in unit-diagonal coordinates, where the weights are scale_a * W."""

    matrix_aa: Tensor
    """H / (scale scale') + diag(penalty)."""
    cross_ao: Tensor
    """C / scale, without the penalty."""
    right_ao: Tensor
    """C / scale + penalty * scale * W_old."""
    scale_a: Tensor
    """sqrt(diag H); 1 for inputs that are always zero."""
    penalty_a: Tensor
    """The ridge; 1 for inputs that are always zero."""
    dead_a: Tensor
    """Whether an input is always zero. Removing such an input costs nothing; if it stays, it keeps its old weights."""
    old_ao: Tensor
    """W_old, as stored."""
    energy: float
    """||T||^2, of centred rows if there is an intercept."""
    old_is_minimum: bool
    """Whether the target is the output of the old weights, which then are the solution."""

    def scaled_old(self) -> Tensor:
        """Return the old weights in these coordinates (a x o); zero for inputs that are always zero."""
        return _scaled(self.old_ao, self.scale_a, self.dead_a)

    def unscaled(self, weight_ko: Tensor, keep: Tensor) -> Tensor:
        """Return the weights of some inputs as they are stored; the old weights of inputs that are always zero."""
        dead = self.dead_a[keep, None]
        return torch.where(dead, self.old_ao[keep], weight_ko / self.scale_a[keep, None]).float()

    def submatrix(self, keep: Tensor) -> Tensor:
        """Return the matrix of some inputs (k x k), row block by row block so that no other copy is made."""
        result = self.matrix_aa.new_empty(len(keep), len(keep))
        for rows, part in zip(keep.split(PANEL), result.split(PANEL), strict=True):
            torch.index_select(self.matrix_aa[rows], 1, keep, out=part)
        return result

    def error(self, weight_ao: Tensor) -> float:
        """Return ||X W - T||^2, without the penalty, at a minimiser in these coordinates; removed inputs are zero."""
        linear = (weight_ao * (self.right_ao - 2 * self.cross_ao)).sum(1).double().sum()
        square = (self.penalty_a[:, None] * weight_ao.square()).sum(1).double().sum()
        return float(self.energy + linear - square)


def _scaled(weight_ao: Tensor, scale_a: Tensor, dead_a: Tensor) -> Tensor:
    """Return weights in unit-diagonal coordinates; zero for inputs that are always zero."""
    return (scale_a[:, None] * weight_ao).masked_fill(dead_a[:, None], 0.0)


def normal_equations(
    gram_aa: Tensor,
    cross_ao: Tensor | None,
    energy: float,
    old_ao: Tensor,
    ridge: float,
    *,
    overwrite: bool = False,
) -> NormalEquations:
    """Set up the penalised normal equations of one output projection.

    Args:
        gram_aa: X'X; of centred rows if an intercept is fitted.
        cross_ao: X'T; None if the target is the output of `old_ao`, so that X'T = X'X W_old.
        energy: ||T||^2; not read if `cross_ao` is None.
        old_ao: The old weight, inputs first.
        ridge: Strength of the penalty toward the old weight, relative to the energy of each input.
        overwrite: Whether the result may use the memory of `gram_aa` and `cross_ao`.
    """
    dtype = torch.float32 if ridge >= FLOAT32_RIDGE else torch.float64
    matrix = gram_aa.to(dtype, copy=not overwrite)
    old = old_ao.to(dtype)
    diagonal = matrix.diagonal().clone()
    # The threshold is far below the mean, because ordinary inputs are only a thousandth of a massive activation.
    dead = diagonal <= diagonal.mean() * torch.finfo(torch.float32).eps ** 2
    scale = torch.where(dead, torch.ones_like(diagonal), diagonal).sqrt()
    penalty = torch.where(dead, torch.ones_like(diagonal), torch.full_like(diagonal, ridge))
    matrix /= scale[:, None]
    matrix /= scale[None, :]
    scaled_old = _scaled(old, scale, dead)
    if cross_ao is None:
        cross = matrix @ scaled_old
        energy = float((cross * scaled_old).sum(1).double().sum())
    else:
        cross = cross_ao.to(dtype, copy=not overwrite).div_(scale[:, None])
    matrix.diagonal().add_(penalty)
    right = cross + penalty[:, None] * scaled_old
    return NormalEquations(matrix, cross, right, scale, penalty, dead, old, energy, old_is_minimum=cross_ao is None)


def least_squares(normal: NormalEquations, keep: Tensor) -> tuple[Tensor, float]:
    """Return the best weights of the kept inputs (k x o), and ||XW - T||^2 without the penalty.

    Raises:
        FloatingPointError: The equations hold NaN or infinity.
    """
    weight = _solve(normal.submatrix(keep), normal.right_ao[keep], normal.scaled_old()[keep])
    full = torch.zeros_like(normal.right_ao)
    full[keep] = weight
    # Rounding may make an error negative; NaN stays NaN.
    return normal.unscaled(weight, keep), max(normal.error(full), 0.0)


def _solve(matrix_aa: Tensor, right_ao: Tensor, old_ao: Tensor) -> Tensor:
    """Return the solution of matrix_aa W = right_ao; of several solutions, the nearest to `old_ao`.

    Without a ridge the matrix is singular if inputs are linearly dependent, as after a LayerNorm, whose outputs sum to
    zero up to gain and bias. Eigenvalues that rounding could have made of zero carry no information: along their
    eigenvectors, the old weights stay.
    """
    floor = ROUNDING * len(matrix_aa) ** 0.5
    factor, failed = torch.linalg.cholesky_ex(matrix_aa)
    if not failed and _least_eigenvalue(factor) > floor:
        return torch.cholesky_solve(right_ao, factor)
    del factor
    if not torch.isfinite(matrix_aa.sum()):
        raise FloatingPointError("the normal equations are NaN or infinite; are activations finite?")
    values, vectors = torch.linalg.eigh(matrix_aa.double())
    inverse = torch.where(values > floor, 1 / values, 0.0)
    residual = (right_ao - matrix_aa @ old_ao).double()
    return old_ao + (vectors @ (inverse[:, None] * (vectors.T @ residual))).to(old_ao.dtype)


def _least_eigenvalue(factor_aa: Tensor) -> float:
    """Estimate the smallest eigenvalue of a matrix from its Cholesky factor, by inverse iteration.

    The estimate is never too small. It is infinite for a matrix without rows.
    """
    start = torch.randn(len(factor_aa), 1, dtype=factor_aa.dtype, generator=torch.Generator().manual_seed(0))
    vector, size = start.to(factor_aa.device), 0.0
    for _ in range(4):
        vector = torch.cholesky_solve(vector / torch.linalg.vector_norm(vector), factor_aa)
        size = float(torch.linalg.vector_norm(vector))
    return 1 / size if size else float("inf")


def factorise(matrix_aa: Tensor) -> Tensor:
    """Return the lower Cholesky factor; the diagonal of a matrix that rounding made indefinite is raised.

    It is raised by ten times more until that suffices.

    Raises:
        FloatingPointError: The matrix is far from positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix_aa)
    jitter = torch.finfo(matrix_aa.dtype).eps * len(matrix_aa)
    while bool(failed):
        if jitter > 1:
            raise FloatingPointError("the normal equations are not positive definite; are activations finite?")
        factor, failed = torch.linalg.cholesky_ex(matrix_aa + jitter * torch.diag_embed(matrix_aa.diagonal()))
        jitter *= 10
    return factor


def factorise_each(matrices_uss: Tensor) -> Tensor:
    """Return the lower Cholesky factors of a batch of small matrices, with a jitter for those that need one."""
    factors, failed = torch.linalg.cholesky_ex(matrices_uss)
    for index in failed.nonzero()[:, 0].tolist():
        factors[index] = factorise(matrices_uss[index])
    return factors


def invert(matrix_aa: Tensor) -> Tensor:
    """Invert a positive definite matrix in place; needs the memory of one more panel.

    This is the sweep operator, panel by panel: with the pivot block A_kk, rows A_k become A_kk^-1 A_k, and all others
    A_ij - A_ik A_kk^-1 A_kj. Once every block has been the pivot, the negative inverse is left. Entries on and above
    the diagonal suffice: 1.2 a^3 operations.
    """
    rows = panel_rows(len(matrix_aa))
    for start, stop in panels(len(matrix_aa)):
        pivot = torch.cat([matrix_aa[:start, start:stop].T, matrix_aa[start:stop, start:]], 1)
        factor = factorise(pivot[:, start:stop])
        swept = torch.cholesky_solve(pivot, factor)
        identity = torch.eye(stop - start, dtype=factor.dtype, device=factor.device)
        swept[:, start:stop] = -torch.cholesky_solve(identity, factor)
        for first in range(0, len(matrix_aa), rows):
            if first != start:
                other = slice(first, first + rows)
                matrix_aa[other, first:].addmm_(pivot[:, other].T, swept[:, first:], alpha=-1)
        matrix_aa[:start, start:stop] = swept[:, :start].T
        matrix_aa[start:stop, start:] = swept[:, start:]
    for start, stop in panels(len(matrix_aa)):
        matrix_aa[start:stop, start:].neg_()
        mirror_panel(matrix_aa, start, stop)
    return matrix_aa
