"""Level 1 of a feed-forward module fitted along with its level 2: one Gauss-Newton step.

A module without a gate gives y = D' act(U s + b), one with a gate y = D' (act(G s) * U s). To first order, changes dU
and dG of the kept rows change it by

    J(dU, dG) = D' (f_u * dU s + f_g * dG s),   f_u = act(G s), f_g = act'(G s) * U s,

or f_u = act'(U s + b) alone, without a gate. That is linear in them, so that the best changes are a least-squares
problem once more: the minimum of

    sum_t w_t ||r_t - J_t(V)||^2 + ridge * sum_jk b_j a_k V_jk^2,

r being what level 2 leaves of the target, b_j = ||D_j||^2 sum_t w_t f_tj^2 and a_k = sum_t w_t s_tk^2 / sum_t w_t: the
pull to the old weights, relative to each weight's own energy as in `numerics/ridge.py`. V has hundreds of thousands of
entries; conjugate gradients solve for it with two products J and J' over the tokens each step. They are preconditioned
by the curvature that would hold if factors and inputs were independent, one k x k and one d x d matrix (Kronecker
factors), which brings most of the gain in the first few steps; stopping there is part of the regularisation.

Shapes: n tokens, d residual width, k kept channels, o outputs (= d).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.base.processes import Processes
from secateur.model.structure import PrunableModule
from secateur.numerics.ridge import factorise

PRECONDITIONER_TOKENS = 8192
"""Tokens from which the preconditioner is estimated; it has to be roughly right only."""


@dataclass(frozen=True)
class Part:
    """Some tokens of a linearised module, weighted: factors are times the root of each token's weight.

    They may be bfloat16: their products only steer a few steps of conjugate gradients. Sums over parts are float32.
    """

    source_nd: Tensor
    factors: Sequence[Tensor]
    """(n x k) each: f_u, then f_g where there is a gate."""


def outputs(module: PrunableModule, tensors: Mapping[str, Tensor], source_nd: Tensor, kept: Tensor) -> list[Tensor]:
    """What the module's level-1 matrices, up and then gate, give for the kept channels (n x k each)."""
    found = []
    for slab in module.channel_projections:
        at, bias = slab.offset + kept, tensors.get(slab.bias)
        output = source_nd @ tensors[slab.name].index_select(slab.axis, at).movedim(slab.axis, 1)
        found.append(output if bias is None else output + bias[at])
    return found


def factors(activation: Callable[[Tensor], Tensor], pre: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """f_u, and f_g where there is a gate, at the `outputs` of level 1 (n x k each)."""
    at = pre[-1]
    # Entry by entry, so that the gradient of the sum is the derivative; a tenth of what forward mode takes.
    with torch.inference_mode(False), torch.enable_grad():
        given = at.clone().requires_grad_()
        value = activation(given)
        value.sum().backward()
        slope = given.grad
    assert slope is not None
    return (slope,) if len(pre) == 1 else (value.detach(), slope * pre[0])


class Tangent:
    """The linearised module: sums over the tokens, and the step that they ask for."""

    def __init__(self, weight_ko: Tensor, matrices: int, width: int, tokens: int, processes: Processes | None = None):
        """For a level-2 weight, so many level-1 matrices with inputs of a width, and so many tokens in all.

        Each process adds its own tokens.
        """
        self.weight_ko, self._processes = weight_ko, processes or Processes()
        k, self.stride = len(weight_ko), max(1, tokens // PRECONDITIONER_TOKENS)
        self.right = [weight_ko.new_zeros(k, width) for _ in range(matrices)]
        """J'r, a (k x d) matrix for each level-1 matrix."""
        self._factors = [weight_ko.new_zeros(k, k) for _ in range(matrices)]
        self._source = weight_ko.new_zeros(width, width)
        self._weight = 0.0

    def add(self, part: Part, residual_no: Tensor, root_n1: Tensor) -> None:
        """Add tokens; `residual_no` is weighted as factors are, by the root of each token's weight."""
        for total, one in zip(self.right, self._pulled(part, residual_no), strict=True):
            total += one
        every, exact = slice(None, None, self.stride), self.weight_ko.dtype
        for total, matrix in zip(
            (self._source, *self._factors), (part.source_nd * root_n1, *part.factors), strict=True
        ):
            sample = matrix[every].to(exact)
            total.addmm_(sample.T, sample)
        self._weight += float(root_n1[every].double().square().sum())

    def step(self, parts: Callable[[], Iterable[Part]], ridge: float, iterations: int) -> list[Tensor]:
        """The changes V, one (k x d) for each level-1 matrix, after so many steps of conjugate gradients.

        `parts` gives, each time anew, the tokens that were added. The sums are used up. All processes get the same.
        """
        processes = self._processes
        self._weight = processes.total(self._weight)
        processes.all_reduce(self._source, *self._factors, *self.right)
        curvature = self.weight_ko @ self.weight_ko.T
        left = [curvature * (total * self.stride) for total in self._factors]
        right = self._source / max(self._weight, torch.finfo(torch.float32).tiny)
        self._factors.clear()
        pulls = [(ridge * b.diagonal()[:, None].clone(), right.diagonal().clone()) for b in left]
        inverse_k, inverse_d = [_preconditioner(b, ridge) for b in left], _preconditioner(right, ridge)
        del left, right, curvature

        def preconditioned(gap: list[Tensor]) -> list[Tensor]:
            return [
                torch.cholesky_solve(torch.cholesky_solve(g, k).T, inverse_d).T
                for g, k in zip(gap, inverse_k, strict=True)
            ]

        def curved(change: list[Tensor]) -> list[Tensor]:
            total = [
                v * (rows * processes.is_first) * columns for v, (rows, columns) in zip(change, pulls, strict=True)
            ]
            for part in parts():
                for sums, one in zip(total, self._pulled(part, self._pushed(part, change)), strict=True):
                    sums += one
            processes.all_reduce(*total)
            return total

        changes, gap = [torch.zeros_like(r) for r in self.right], self.right
        way = preconditioned(gap)
        slope = _dot(gap, way)
        least = slope * torch.finfo(self.weight_ko.dtype).eps ** 2
        for number in range(iterations):
            # What is left to gain may be rounding. One process decides, so that none waits for another in vain.
            if not processes.total(processes.is_first and slope > least):
                break
            bent = curved(way)
            length = slope / _dot(way, bent)
            for v, w in zip(changes, way, strict=True):
                v.add_(w, alpha=length)
            if number + 1 == iterations:
                break
            for g, b in zip(gap, bent, strict=True):
                g.sub_(b, alpha=length)
            del bent
            towards, before = preconditioned(gap), slope
            slope = _dot(gap, towards)
            way = [t.add_(w, alpha=slope / before) for t, w in zip(towards, way, strict=True)]
        # Sums that were added up in another order elsewhere would let the weights drift apart.
        shared = processes.broadcast_tensors(
            {str(number): change for number, change in enumerate(changes)}, 0, self.weight_ko.device
        )
        return list(shared.values())

    def _pushed(self, part: Part, change: Sequence[Tensor]) -> Tensor:
        """J(V) of some tokens (n x o), computed as they are stored."""
        inner = torch.zeros_like(part.factors[0])
        for factor, matrix in zip(part.factors, change, strict=True):
            inner.addcmul_(part.source_nd @ matrix.T.to(inner.dtype), factor)
        return inner @ self.weight_ko.to(inner.dtype)

    def _pulled(self, part: Part, outputs_no: Tensor) -> list[Tensor]:
        """J'(y) of some tokens, computed as they are stored."""
        inner = outputs_no @ self.weight_ko.T.to(outputs_no.dtype)
        return [(inner * factor).T @ part.source_nd for factor in part.factors]


def _preconditioner(matrix: Tensor, ridge: float) -> Tensor:
    """Cholesky factor of a Kronecker factor of the curvature, with its share of the ridge on the diagonal."""
    diagonal = matrix.diagonal()
    floor = diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny) * 1e-6
    damped = matrix + torch.diag(diagonal * max(ridge, 1e-6) ** 0.5 + floor)
    return factorise(damped)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x * y).sum(dtype=torch.float64)) for x, y in zip(a, b, strict=True))
