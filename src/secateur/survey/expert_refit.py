"""The share of a mixture's error that is left behind the refit, when experts leave or channels of all of them.

Experts are solved one after the other for what the output lacks, as in `secateur.fit.stage`. An expert often has fewer
tokens than channels, so that each token is judged by the fit without it: for ridge regression the
residual then is r_i / (1 - h_i), with h the diagonal of the hat matrix (Allen's PRESS, 1974).

Shapes: n tokens, m of them at an expert, s of its channels, d residual width.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from secateur.base.processes import Processes
from secateur.criteria.routed_tokens import RoutedTokens

LEAST = 1e-4
"""Least ridge by which a row is judged without it."""


def share_left_by_refit(
    routed: RoutedTokens,
    scale_n: Tensor,
    unit: Callable[[Tensor], Tensor],
    alive: Tensor,
    stay: Mapping[int, Tensor] | None,
    ridge: float,
) -> float:
    """Return the share of the squared error of a cut that is left once experts are refitted, at most one.

    Args:
        routed: tokens at the mixture, with their target and weights.
        scale_n: of each token's error.
        unit: brings the weight of an output projection into the units in which errors count, but for that scale.
        alive: the experts that stay.
        stay: channels that stay, of each expert that loses some; None where no expert does.
        ridge: of the refit.
    """
    mixture, processes = routed.mixture, routed.processes
    routes, left = mixture.route(routed.x_nd, alive), routed.target_nd.clone()
    parts, shared = mixture.parts(alive), mixture.module.units

    def at(expert: int) -> tuple[Tensor, Tensor]:
        """Return the tokens of an expert, and the inputs of its output projection times gate and scale."""
        tokens, rows = mixture.gated(expert, routed.x_nd, routes)
        return tokens, rows * scale_n[tokens][:, None]

    def kept(expert: int, values: Tensor, axis: int) -> Tensor:
        """Return the part of the channels that stay."""
        return values if stay is None or expert not in stay else values.index_select(axis, stay[expert])

    def error() -> float:
        return processes.total(float((left.square().sum(1) * routed.weight_n).sum(dtype=torch.float64)))

    for expert in parts:
        tokens, rows = at(expert)
        weight = unit(mixture.weight(expert))
        lost = kept(expert, rows, 1) @ kept(expert, weight, 0)
        if expert == shared:
            # What is wanted is without it.
            lost -= rows @ weight
        elif (bias := mixture.bias(expert)) is not None:
            lost += (routes.of(expert)[1] * scale_n[tokens])[:, None] * unit(bias)
        left.index_add_(0, tokens, -lost)
    before = error()
    for expert in parts:
        tokens, rows = at(expert)
        wide, rows = rows.shape[1], kept(expert, rows, 1)
        root = routed.weight_n[tokens].sqrt()[:, None]
        every, start = _gathered(processes, torch.cat([rows * root, left[tokens] * root], 1))
        if len(every):
            penalty = ridge * (1 + wide / len(every))
            judged = leave_one_out_residuals(every[:, : rows.shape[1]], every[:, rows.shape[1] :], penalty)
            left[tokens] = judged[start : start + len(tokens)] / root
    return min(error() / before, 1.0) if before else 1.0


def leave_one_out_residuals(x_ms: Tensor, r_md: Tensor, ridge: float) -> Tensor:
    """Each row's residual (m x d) in the ridge regression of r on x from all other rows.

    The penalty is `ridge` times each input's energy, and never none: m inputs would fit m rows, and say nothing of
    another. The smaller of two systems is solved, m x m or s x s.
    """
    energy = x_ms.square().sum(0)
    penalty = max(ridge, LEAST) * energy.clamp_min(torch.finfo(x_ms.dtype).eps * max(float(energy.mean()), 1e-30))
    if len(x_ms) <= x_ms.shape[1]:
        kernel = (x_ms / penalty) @ x_ms.T
        kernel.diagonal().add_(1)
        inverse = torch.linalg.inv(kernel)
        return (inverse @ r_md) / inverse.diagonal()[:, None]
    gram = x_ms.T @ x_ms
    gram.diagonal().add_(penalty)
    factor = torch.linalg.cholesky(gram)
    fitted = x_ms @ torch.cholesky_solve(x_ms.T @ r_md, factor)
    leverage = torch.linalg.solve_triangular(factor, x_ms.T, upper=False).square().sum(0)
    return (r_md - fitted) / (1 - leverage)[:, None]


def _gathered(processes: Processes, rows: Tensor) -> tuple[Tensor, int]:
    """Return the rows of all processes, and the place where this process's rows begin."""
    if processes.is_single:
        return rows, 0
    counts = processes.all_gather(len(rows))
    every, start = rows.new_zeros(sum(counts), rows.shape[1]), sum(counts[: processes.rank])
    every[start : start + len(rows)] = rows
    processes.all_reduce(every)
    return every, start
