"""Fit of the input projections of a feed-forward, after its output projection: one Gauss-Newton step.

With the output projection D, a feed-forward gives y = D' act(U x + b), or with a gate y = D' (act(G x) * U x). To first
order, changes dU and dG of the kept rows change y by

    J(dU, dG) = D' (f_u * dU x + f_g * dG x),   f_u = act(G x), f_g = act'(G x) * U x,

or f_u = act'(U x + b) alone, without a gate. The best changes V = (dU, dG) are the minimum of

    sum_n w_n ||r_n - J_n(V)||^2 + ridge * sum_jk b_j a_k V_jk^2,
    b_j = ||D_j||^2 sum_n w_n f_nj^2,   a_k = sum_n w_n x_nk^2 / sum_n w_n,

where r is the residual that the output projection leaves of the target. As in `secateur.numerics.ridge`, the penalty is
relative to the energy of each weight's input.

V has hundreds of thousands of entries, so the problem is solved by conjugate gradients. Each step takes one product by
J and one by J' over all tokens. The preconditioner is the curvature that would hold if factors and inputs were
independent: a Kronecker product of one k x k and one d x d matrix. It brings most of the gain in the first few steps,
and stopping there is part of the regularisation.

Shapes: n tokens, d residual width (inputs of the module, outputs of D), k kept channels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.base.processes import Processes
from secateur.model.structure import PrunableModule
from secateur.numerics.ridge import factorise

PRECONDITIONER_TOKENS = 8192
"""Number of tokens from which the preconditioner is estimated; a rough estimate suffices."""


@dataclass(frozen=True)
class TangentRows:
    """Some tokens of a linearised module.

    Tensors may be bfloat16, as their products only steer a few steps of conjugate gradients. Sums of them are float32.
    """

    input_nd: Tensor
    """Inputs of the module, x."""
    factors_nk: Sequence[Tensor]
    """f_u, and f_g if there is a gate; multiplied by the root of each token's weight."""

    def to(self, dtype: torch.dtype) -> "TangentRows":
        """Return the rows in another dtype."""
        return TangentRows(self.input_nd.to(dtype), [factor.to(dtype) for factor in self.factors_nk])


def projection_outputs(
    module: PrunableModule, tensors: Mapping[str, Tensor], x_nd: Tensor, kept: Tensor
) -> list[Tensor]:
    """Return the outputs of the input projections for the kept channels (n x k each): up, then gate."""
    found = []
    for slab in module.channel_projections:
        at, bias = slab.offset + kept, tensors.get(slab.bias)
        output = x_nd @ tensors[slab.name].index_select(slab.axis, at).movedim(slab.axis, 1)
        found.append(output if bias is None else output + bias[at])
    return found


def tangent_factors(activation: Callable[[Tensor], Tensor], projected: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return f_u, and f_g if there is a gate, at outputs of the input projections (n x k each)."""
    activated = projected[-1]
    # The activation works entry by entry, so the gradient of the sum is its derivative. Forward mode takes ten times
    # as long.
    with torch.inference_mode(False), torch.enable_grad():
        z = activated.clone().requires_grad_()
        value = activation(z)
        value.sum().backward()
        slope = z.grad
    assert slope is not None
    return (slope,) if len(projected) == 1 else (value.detach(), slope * projected[0])


class GaussNewtonStep:
    """Gauss-Newton step: sums over the tokens of a linearised module, and the solution by conjugate gradients."""

    def __init__(self, weight_kd: Tensor, matrices: int, width: int, tokens: int, processes: Processes | None = None):
        """Start with empty sums.

        Args:
            weight_kd: The output projection, D.
            matrices: Number of input projections: 2 with a gate, else 1.
            width: Number of inputs of the module.
            tokens: Number of tokens in all processes; each process adds its own tokens.
            processes: Processes that share the tokens; by default one.
        """
        self.weight_kd, self._processes = weight_kd, processes or Processes()
        k, self._stride = len(weight_kd), max(1, tokens // PRECONDITIONER_TOKENS)

        def zeros(rows: int, columns: int) -> Tensor:
            return weight_kd.new_zeros(rows, columns, dtype=torch.float64)

        self.gradient = [zeros(k, width) for _ in range(matrices)]
        """J'r (k x d), for each input projection."""
        self._factor_grams = [zeros(k, k) for _ in range(matrices)]
        self._input_gram = zeros(width, width)
        self._weights: list[float] = []
        """Sum of the token weights of each part."""

    def add(self, rows: TangentRows, residual_nd: Tensor, root_n1: Tensor) -> None:
        """Add tokens.

        Args:
            rows: Linearised rows.
            residual_nd: Residuals r, multiplied by the root of each token's weight.
            root_n1: Root of each token's weight.
        """
        for total, part in zip(self.gradient, self._vjp(rows, residual_nd), strict=True):
            total += part
        some, dtype = slice(None, None, self._stride), self.weight_kd.dtype
        matrices = (rows.input_nd * root_n1, *rows.factors_nk)
        for gram, matrix in zip((self._input_gram, *self._factor_grams), matrices, strict=True):
            sample = matrix[some].to(dtype)
            gram += sample.T @ sample
        self._weights.append(float(root_n1[some].double().square().sum()))

    def solve(self, parts: Callable[[], Iterable[TangentRows]], ridge: float, iterations: int) -> list[Tensor]:
        """Return the changes V (k x d), one for each input projection; the sums cannot be used again.

        Args:
            parts: Function that yields all rows that were added, each time it is called.
            ridge: Strength of the penalty.
            iterations: Steps of conjugate gradients.
        """
        processes = self._processes
        precondition, penalties = self._preconditioner(ridge)

        def curvature(direction: list[Tensor]) -> list[Tensor]:
            """Return (J'J + penalty) V, summed over all processes."""
            direction = [v.to(self.weight_kd.device) for v in direction]
            sums = [torch.zeros_like(v, dtype=torch.float64) for v in direction]
            for rows in parts():
                for one, part in zip(sums, self._vjp(rows, self._jvp(rows, direction)), strict=True):
                    one += part
            totals = self._totals(*sums)
            for total, v, (b, a) in zip(totals, direction, penalties, strict=True):
                total += v * b * a
            return totals

        gradient = self._totals(*self.gradient)
        self.gradient.clear()
        changes = _conjugate_gradients(curvature, precondition, gradient, iterations, processes)
        # Machines of different kinds round differently, and their weights would differ more and more.
        tensors = {str(number): change for number, change in enumerate(changes)}
        return list(processes.broadcast_tensors(tensors, 0, self.weight_kd.device).values())

    def _preconditioner(
        self, ridge: float
    ) -> tuple[Callable[[list[Tensor]], list[Tensor]], list[tuple[Tensor, Tensor]]]:
        """Return the preconditioner, and ridge * b (k x 1) with a (d) for each input projection."""
        processes = self._processes
        weight = max(processes.total(self._weights), torch.finfo(torch.float32).tiny)
        right_dd = self._totals(self._input_gram)[0] / weight
        weight_gram, left_kk = self.weight_kd @ self.weight_kd.T, []
        while self._factor_grams:
            (gram,) = self._totals(self._factor_grams.pop(0))
            left_kk.append(gram.mul_(weight_gram).mul_(self._stride))
        a = right_dd.diagonal().clone()
        penalties = [(ridge * left.diagonal()[:, None].clone(), a) for left in left_kk]
        factors_k, factor_d = [_damped_factor(left, ridge) for left in left_kk], _damped_factor(right_dd, ridge)

        def precondition(gradient: list[Tensor]) -> list[Tensor]:
            return [
                torch.cholesky_solve(torch.cholesky_solve(g, factor_k).T, factor_d).T
                for g, factor_k in zip(gradient, factors_k, strict=True)
            ]

        return precondition, penalties

    def _totals(self, *sums: Tensor) -> list[Tensor]:
        """Return sums over all processes in the dtype of the weights."""
        return self._processes.total_tensors(*sums, dtype=self.weight_kd.dtype)

    def _jvp(self, rows: TangentRows, change: Sequence[Tensor]) -> Tensor:
        """Return J(V) of some tokens (n x d), in the dtype of the rows."""
        channels_nk = torch.zeros_like(rows.factors_nk[0])
        for factor, matrix in zip(rows.factors_nk, change, strict=True):
            channels_nk.addcmul_(rows.input_nd @ matrix.T.to(channels_nk.dtype), factor)
        return channels_nk @ self.weight_kd.to(channels_nk.dtype)

    def _vjp(self, rows: TangentRows, output_nd: Tensor) -> list[Tensor]:
        """Return J'(y) of some tokens (k x d), one for each input projection, in the dtype of the rows."""
        channels_nk = output_nd @ self.weight_kd.T.to(output_nd.dtype)
        return [(channels_nk * factor).T @ rows.input_nd for factor in rows.factors_nk]


def _conjugate_gradients(
    curvature: Callable[[list[Tensor]], list[Tensor]],
    precondition: Callable[[list[Tensor]], list[Tensor]],
    residual: list[Tensor],
    iterations: int,
    processes: Processes,
) -> list[Tensor]:
    """Solve curvature(V) = residual by a few steps of preconditioned conjugate gradients; overwrites `residual`."""
    changes = [torch.zeros_like(part) for part in residual]
    direction = precondition(residual)
    slope = _dot(residual, direction)
    rounding = slope * torch.finfo(residual[0].dtype).eps ** 2
    for number in range(iterations):
        # The remaining gain may be rounding. One process decides, so that all processes stop at the same step.
        if not processes.total([processes.is_first and slope > rounding]):
            break
        curved = curvature(direction)
        length = slope / _dot(direction, curved)
        for change, step in zip(changes, direction, strict=True):
            change.add_(step, alpha=length)
        if number + 1 == iterations:
            break
        for part, step in zip(residual, curved, strict=True):
            part.sub_(step, alpha=length)
        del curved
        preconditioned, before = precondition(residual), slope
        slope = _dot(residual, preconditioned)
        direction = [new.add_(old, alpha=slope / before) for new, old in zip(preconditioned, direction, strict=True)]
    return changes


def _damped_factor(matrix: Tensor, ridge: float) -> Tensor:
    """Return the Cholesky factor of one factor of the Kronecker product, with its part of the ridge on the diagonal."""
    diagonal = matrix.diagonal()
    floor = diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny) * 1e-6
    return factorise(matrix + torch.diag(diagonal * max(ridge, 1e-6) ** 0.5 + floor))


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x * y).sum(dtype=torch.float64)) for x, y in zip(a, b, strict=True))
