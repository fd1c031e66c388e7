"""Share of a mixture's error that is left after the refit, once experts, or channels of all experts, are removed.

Experts are refitted one after the other to the residual error of the output, as in `secateur.fit.mixture`. An
expert often has fewer tokens than channels, and would then fit its own tokens without error. Each token is therefore
judged by the fit to all other tokens. In ridge regression, its residual is then r_i / (1 - h_i), with the hat matrix's
diagonal h (Allen's PRESS statistic, 1974).

Shapes: n tokens, m tokens routed to one expert, s channels of the expert that are kept, d residual width.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from secateur.criteria.routed_tokens import RoutedTokens

MIN_RIDGE = 1e-4
"""Smallest ridge of a leave-one-out fit."""


def share_left_by_refit(
    routed: RoutedTokens,
    scale_n1: Tensor,
    unit: Callable[[Tensor], Tensor],
    experts: Tensor,
    channels: Mapping[int, Tensor] | None,
    ridge: float,
) -> float:
    """Return the share of the squared error of a cut that is left once the experts are refitted, at most 1.

    Args:
        routed: Tokens at the mixture, with their targets and weights.
        scale_n1: Factor of each token's error.
        unit: Function that converts weights and biases of output projections to the units of errors, without
            `scale_n1`.
        experts: Indices of the kept experts.
        channels: Kept channels by expert; None if all experts keep all channels. The shared expert may be missing.
        ridge: Ridge of the refit.
    """
    mixture = routed.mixture
    routes, residual_nd = mixture.route(routed.x_nd, experts), routed.target_nd.clone()
    parts, shared = mixture.with_shared(experts), mixture.module.units

    def projection_inputs(expert: int) -> tuple[Tensor, Tensor]:
        """Return the tokens of an expert (m), and the inputs of its output projection times gate and scale (m x f)."""
        tokens, rows_mf = mixture.gated_input(expert, routed.x_nd, routes)
        return tokens, rows_mf * scale_n1[tokens]

    def keep_channels(expert: int, values: Tensor, axis: int) -> Tensor:
        """Return the part of a tensor that belongs to the kept channels of an expert."""
        return values if channels is None or expert not in channels else values.index_select(axis, channels[expert])

    for expert in parts:
        tokens, rows_mf = projection_inputs(expert)
        weight_fd = unit(mixture[expert].weight)
        output_md = keep_channels(expert, rows_mf, 1) @ keep_channels(expert, weight_fd, 0)
        if expert == shared:
            # The targets do not contain the output of the dense shared expert.
            output_md -= rows_mf @ weight_fd
        elif (bias := mixture[expert].bias) is not None:
            output_md += routes.of(expert)[1][:, None] * scale_n1[tokens] * unit(bias)
        residual_nd.index_add_(0, tokens, -output_md)
    before = routed.summed_energy(residual_nd)
    for expert in parts:
        tokens, rows_mf = projection_inputs(expert)
        root_m1, rows_ms = routed.weight_n[tokens].sqrt()[:, None], keep_channels(expert, rows_mf, 1)
        if len(tokens):
            penalty = ridge * (1 + rows_mf.shape[1] / len(tokens))
            residuals = leave_one_out_residuals(rows_ms * root_m1, residual_nd[tokens] * root_m1, penalty)
            residual_nd[tokens] = residuals / root_m1
    return min(routed.summed_energy(residual_nd) / before, 1.0) if before else 1.0


def leave_one_out_residuals(x_ms: Tensor, r_md: Tensor, ridge: float) -> Tensor:
    """Return the residual of each row (m x d) in the ridge regression of r on x that is fitted to all other rows.

    The smaller of two equivalent linear systems is solved, m x m or s x s.

    Args:
        x_ms: Inputs.
        r_md: Targets.
        ridge: Penalty, relative to the energy of each input. At least `MIN_RIDGE` is used, because without a penalty
            m inputs fit m rows exactly.
    """
    energy = x_ms.square().sum(0)
    penalty = max(ridge, MIN_RIDGE) * energy.clamp_min(torch.finfo(x_ms.dtype).eps * max(float(energy.mean()), 1e-30))
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
