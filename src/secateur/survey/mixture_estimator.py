"""Error curves of a mixture of experts: its output error as experts, or channels of all experts, are removed.

The estimator keeps a sample of the mixture's tokens while the dense block runs. Afterwards, one process compares
experts on the samples of all processes; see `secateur.criteria.experts`. The channels of an expert are removed in
ascending order of the energy that they contribute to the expert's output. Errors are measured with unchanged weights.
The share of them that is left after the refit is estimated at one cut for each axis, where half of the units are
removed.

Shapes: n tokens, m tokens routed to one expert, d residual width, f channels of an expert.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from secateur.criteria.experts import MAX_TOKENS, expert_order
from secateur.criteria.routed_tokens import RoutedTokens
from secateur.criteria.statistics import module_seed
from secateur.model.mixture import Mixture
from secateur.model.rows import Batch
from secateur.model.stream import FilledModule
from secateur.model.units.experts import EXPERT_CHANNELS, EXPERTS
from secateur.survey.curve_estimator import PROBED_SHARE, CurveEstimator
from secateur.survey.curves import ErrorCurve
from secateur.survey.expert_refit import share_left_by_refit
from secateur.survey.probes import Cut

GRID_POINTS = 16
"""Number of channel counts at which errors are measured; errors in between are interpolated."""


class MixtureEstimator(CurveEstimator):
    """Estimator of error curves from a sample of a mixture's tokens."""

    needs_input = True

    def __init__(self, filled: FilledModule, order: str, tokens: int, kinds: Sequence[str]):
        """Start without tokens.

        Args:
            filled: The mixture of experts of the dense model.
            order: Name of the criterion that determines the order in which experts are removed.
            tokens: Number of tokens to come, in all processes.
            kinds: Kinds of units that may be removed.
        """
        super().__init__(filled)
        stream = filled.stream
        self._order, self._mixture = order, Mixture(stream, filled.layer, filled.module)
        self._kinds, self._stride = kinds, max(1, tokens // MAX_TOKENS)
        self._samples = [torch.empty(0, 2 * stream.width + 2, device=stream.device)]
        """Inputs, outputs, error scales and weights of sampled tokens (m x d + d + 1 + 1), by batch."""

    def add(self, inverse_rms_bt1: Tensor | None, norms_n1: Tensor, batch: Batch) -> None:
        """Add evenly spaced tokens of a batch to the sample, whatever other batches this process has."""
        scale_n1 = norms_n1.reciprocal()
        scale_n1 = scale_n1 if inverse_rms_bt1 is None else scale_n1 * inverse_rms_bt1.reshape(-1, 1)
        weight_n1 = torch.full_like(scale_n1, batch.choice_weight or batch.weight)
        parts = (self.module_input.flatten(0, -2), self.output.flatten(0, -2), scale_n1, weight_n1)
        self._samples.append(torch.cat([part[:: self._stride] for part in parts], 1))

    def measure(self, ridge: float, seed: int) -> tuple[list[ErrorCurve], list[Cut]]:
        """Return the errors of unchanged weights, and cuts to half of the experts and to none.

        There is a curve of experts, and one of the channels of all experts if channels may be removed.
        """
        width, module, processes = self.stream.width, self.module, self.stream.processes
        self.owner = processes.assign_owner(MAX_TOKENS * width * module.units * module.units_inside)
        # The sample is larger than the module itself, so that it is not kept.
        sample, self._samples = torch.cat(self._samples), []
        x_nd, z_nd, scale_n1, weight_n1 = processes.gather(sample).split([width, width, 1, 1], 1)
        if processes.rank != self.owner:
            return [], []

        def to_error_units(y_md: Tensor, tokens_m: Tensor) -> Tensor:
            """Return outputs of some tokens in the units of errors, which are relative to the residual stream."""
            return self.norm.scale(y_md) * scale_n1[tokens_m]

        def share_left(experts: Tensor, channels: Mapping[int, Tensor] | None) -> float:
            """Return the share of a cut's error that is left after the refit; see `share_left_by_refit`."""
            return share_left_by_refit(routed, scale_n1, self.norm.scale, experts, channels, ridge)

        output_nd = to_error_units(z_nd, torch.arange(len(z_nd), device=z_nd.device))
        routed = RoutedTokens(self._mixture, x_nd, output_nd, weight_n1[:, 0], to_error_units)
        count, experts = float(weight_n1.sum(dtype=torch.float64)), self._mixture.all_routed
        energy = routed.summed_energy(output_nd) / count
        # If experts may not be removed, the curve has the dense mixture alone.
        stop = module.min_units if module.kind in self._kinds else module.units
        order, sums = expert_order(self._order, routed, stop, module_seed(seed, self.index, module.role))
        errors, cuts, share = tuple(each / count for each in sums), [self._cut(energy, experts[:0])], 1.0
        if number := round(len(order) * PROBED_SHARE) // module.groups * module.groups:
            kept = experts[torch.isin(experts, torch.tensor(order[:number], device=experts.device), invert=True)]
            cuts.insert(0, self._cut(errors[number] - errors[0], kept))
            share = share_left(kept, None)
        curves = [ErrorCurve(self.index, module.kind, EXPERTS, errors, energy, order, share)]
        if module.axis(EXPERT_CHANNELS).kind in self._kinds:
            sums, orders = channel_errors(routed)
            share = share_left(experts, {expert: every[len(every) // 2 :] for expert, every in orders.items()})
            errors = tuple(each / count for each in sums)
            curves.append(ErrorCurve(self.index, module.kind, EXPERT_CHANNELS, errors, energy, left_after_refit=share))
        return curves, cuts

    def _cut(self, error: float, experts: Tensor) -> Cut:
        """Return a cut that keeps some experts, with unchanged weights."""
        return Cut(self.index, self.module, error, experts, experts.new_empty(0, 0, dtype=torch.float32))

    def output_at(self, cut: Cut, inputs: Tensor) -> Tensor:
        """Return the output of the mixture with the kept experts only."""
        return self._mixture.output(inputs, cut.kept) if len(cut.kept) else torch.zeros_like(inputs)


def channel_errors(routed: RoutedTokens) -> tuple[tuple[float, ...], dict[int, Tensor]]:
    """Measure the error of the mixture's output as channels of all experts are removed, with unchanged weights.

    Errors are measured at up to `GRID_POINTS` numbers of channels and interpolated linearly in between.

    Returns:
        The sum over tokens of squared errors once 0, 1, 2, ... channels of every expert are removed; and for each
        expert its channels in the order of their removal (f).
    """
    mixture = routed.mixture
    module, size, x_nd = mixture.module, mixture.module.units_inside, routed.x_nd
    routes = mixture.route(x_nd, mixture.all_routed)
    # The shared expert keeps all channels, unless it is pruned along with the others.
    parts = mixture.with_shared(mixture.all_routed)[0 if module.shared_multiple or mixture.shared is None else 1 :]
    energies = {}
    for expert in parts:
        tokens, rows_mf = mixture.gated_input(expert, x_nd, routes)
        squares_f = (routed.weight_n[tokens][:, None] * rows_mf.square()).sum(0, dtype=torch.float64)
        energies[expert] = squares_f * mixture[expert].weight.double().square().sum(1)
    orders = {expert: energy.argsort(stable=True) for expert, energy in energies.items()}
    counts = np.unique(np.linspace(0, size, GRID_POINTS + 1).round().astype(int)).tolist()
    # Change of the output at each number of removed channels.
    changes = [torch.zeros_like(routed.target_nd) for _ in counts[1:]]
    for expert, order in orders.items():
        tokens, rows_mf = mixture.gated_input(expert, x_nd, routes)
        removed_md, weight_fd = torch.zeros(len(tokens), x_nd.shape[1], device=x_nd.device), mixture[expert].weight
        for place, (start, stop) in enumerate(itertools.pairwise(counts)):
            channels = order[start * len(order) // size : stop * len(order) // size]
            removed_md += rows_mf[:, channels] @ weight_fd[channels]
            changes[place].index_add_(0, tokens, routed.to_error_units(removed_md, tokens))
    sums = map(routed.summed_energy, changes)
    return tuple(np.interp(np.arange(size), counts, [0.0, *sums]).tolist()), orders
