"""Some tokens at a mixture of experts, and the mixture's output for them if they are routed to given experts.

    y_n = sum_k gate_nk * expert_{e_nk}(x_n),     loss_n = w_n ||target_n - y_n||^2

The output of an expert for a token is computed when it is first needed, and then kept.

Shapes: n tokens, m of them, d residual width, k experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.model.mixture import Mixture, Routes

_SAME_RATIO = 1e-5
"""Largest relative difference between two gates that count as equal."""


@dataclass
class RoutedTokens:
    """Tokens at a mixture, with their target and weights."""

    mixture: Mixture
    x_nd: Tensor
    """Inputs of the mixture."""
    target_nd: Tensor
    """Target of the mixture's output, in error units. The constructor subtracts the shared expert's output."""
    weight_n: Tensor
    """Token weights."""
    to_error_units: Callable[[Tensor, Tensor], Tensor]
    """Function that converts experts' outputs (m x d) for some tokens (m) to error units."""
    _index: Tensor = field(init=False)
    """Row of `_outputs` for each token and expert (n x experts); -1 for pairs that were not computed yet."""
    _outputs: Tensor = field(init=False)
    """Outputs of single experts, in error units, and room for more."""

    def __post_init__(self) -> None:
        if (shared := self.mixture.shared_output(self.x_nd)) is not None:
            self.target_nd = self.target_nd - self.to_error_units(shared, self.all_tokens)
        shape = (len(self.x_nd), self.mixture.module.units)
        self._index = torch.full(shape, -1, dtype=torch.int64, device=self.x_nd.device)
        self._outputs = self.target_nd.new_empty(0, self.target_nd.shape[1])

    @property
    def all_tokens(self) -> Tensor:
        """Numbers of all tokens (n)."""
        return torch.arange(len(self.x_nd), device=self.x_nd.device)

    def output(self, tokens: Tensor, routes: Routes) -> Tensor:
        """Return the mixture's output for some tokens with their routes (m x d)."""
        return (routes.gates[:, None] @ self._expert_outputs(tokens, routes.experts))[:, 0]

    def losses(self, tokens: Tensor, output_md: Tensor) -> Tensor:
        """Return the weighted squared error of an output for some tokens (m)."""
        return (self.target_nd[tokens] - output_md).square().sum(1) * self.weight_n[tokens]

    def summed_energy(self, y_nd: Tensor) -> float:
        """Return the weighted sum over all tokens of ||y_n||^2."""
        return float((y_nd.square().sum(1) * self.weight_n).sum(dtype=torch.float64))

    def rerouted_output(self, tokens: Tensor, before: Routes, output_md: Tensor, after: Routes) -> Tensor:
        """Return the output for some tokens with new routes (m x d), from their output with the routes before.

        If one expert replaces another and the other gates keep their ratios, only the outputs of these two experts are
        read. Reading the outputs of all k experts per token, for each expert that may be removed, would take most of
        the time of computing an order.
        """
        if before.experts.shape != after.experts.shape:
            return self.output(tokens, after)
        is_swap, removed, added, ratio = _find_swaps(before, after)
        result = torch.empty_like(output_md)
        if not bool(is_swap.all()):
            other = ~is_swap
            result[other] = self.output(tokens[other], Routes(after.experts[other], after.gates[other]))
        swapped, removed, added = tokens[is_swap], removed & is_swap[:, None], added & is_swap[:, None]
        less = self._expert_outputs(swapped, before.experts[removed][:, None])[:, 0] * before.gates[removed][:, None]
        more = self._expert_outputs(swapped, after.experts[added][:, None])[:, 0] * after.gates[added][:, None]
        result[is_swap] = (output_md[is_swap] - less) * ratio[is_swap, None] + more
        return result

    def expert_output(self, expert: int, tokens: Tensor) -> Tensor:
        """Return one expert's output for some tokens, without its gate (m x d)."""
        return self._expert_outputs(tokens, torch.full((len(tokens), 1), expert, device=tokens.device))[:, 0]

    def _expert_outputs(self, tokens: Tensor, experts: Tensor) -> Tensor:
        """Return the outputs of experts (m x k) for tokens (m): m x k x d."""
        self.run_experts(tokens, experts)
        return self._outputs[self._index[tokens[:, None], experts]]

    def run_experts(self, tokens: Tensor, experts: Tensor) -> None:
        """Run experts (m x k) on tokens (m), except for pairs that are computed already. One call for many tokens is
        faster than many calls."""
        missing, total = self._index[tokens[:, None], experts] < 0, len(self.x_nd)
        # Sorted by expert, each pair once.
        pairs = (experts * total + tokens[:, None])[missing].unique()
        if not len(pairs):
            return
        first, tokens = int(self._index.max()) + 1, pairs % total
        self._index[tokens, pairs // total] = torch.arange(first, first + len(pairs), device=pairs.device)
        if first + len(pairs) > len(self._outputs):
            # A quarter more, so that not every call copies the outputs of all earlier calls.
            self._outputs.resize_((first + len(pairs)) * 5 // 4, self._outputs.shape[1])
        found, counts = (pairs // total).unique_consecutive(return_counts=True)
        for expert, mine in zip(found.tolist(), tokens.split(counts.tolist()), strict=True):
            self._outputs[self._index[mine, expert]] = self.to_error_units(
                self.mixture.ungated_output(expert, self.x_nd[mine]), mine
            )


def _find_swaps(before: Routes, after: Routes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compare two routes of the same tokens.

    Returns:
        Whether one expert replaces another and the other gates keep their ratios (m); which experts of `before` are
        removed (m x k); which experts of `after` are added (m x k); the factor on the other gates (m).
    """
    same = before.experts[:, :, None] == after.experts[:, None, :]
    removed, added = ~same.any(2), ~same.any(1)
    gates_after = (same * after.gates[:, None, :]).sum(2)
    ratio = gates_after.sum(1) / (before.gates * ~removed).sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    difference = ((gates_after - ratio[:, None] * before.gates) * ~removed).abs().amax(1)
    in_ratio = difference <= _SAME_RATIO * after.gates.abs().amax(1)
    return (removed.sum(1) == 1) & (added.sum(1) == 1) & in_ratio, removed, added, ratio
