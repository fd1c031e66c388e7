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
from secateur.model.axes import Axis
from secateur.model.kinds import KINDS
from secateur.model.mixture import Mixture
from secateur.model.rows import Batch
from secateur.model.stream import FilledModule
from secateur.model.units.experts import EXPERT_CHANNELS, EXPERTS
from secateur.survey.curve_estimator import PROBED_SHARES, CurveEstimator, ModuleActivations
from secateur.survey.curves import ErrorCurve
from secateur.survey.expert_refit import share_left_by_refit
from secateur.survey.probes import Cut

GRID_POINTS = 16
"""Number of channel counts at which errors are measured; errors in between are interpolated."""


class MixtureEstimator(CurveEstimator):
    """Estimator of error curves from a sample of a mixture's tokens."""

    needs_input = True

    def __init__(self, filled: FilledModule, order: str, tokens: int, kinds: Sequence[str] = KINDS):
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

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Experts, and channels of all experts if channels may be removed."""
        return tuple(axis for axis in self.module.axes if axis.name == EXPERTS or axis.kind in self._kinds)

    def add(
        self, activations: ModuleActivations, inverse_rms_bt1: Tensor | None, norms_n1: Tensor, batch: Batch
    ) -> None:
        """Add evenly spaced tokens of a batch to the sample, whatever other batches this process has."""
        width, scale_n = self.stream.width, norms_n1[:, 0].reciprocal()
        scale_n = scale_n if inverse_rms_bt1 is None else scale_n * inverse_rms_bt1.reshape(-1)
        x_md, z_md, scale_m1 = (
            values[:: self._stride]
            for values in (
                activations.module_input.reshape(-1, width),
                activations.output.reshape(-1, width),
                scale_n[:, None],
            )
        )
        weight_m1 = torch.full_like(scale_m1, batch.choice_weight or batch.weight)
        self._samples.append(torch.cat([x_md, z_md, scale_m1, weight_m1], 1))

    def probe_inputs(self, activations: ModuleActivations) -> Tensor:
        """Return the inputs of the mixture."""
        return activations.module_input

    def reduce(self, ridge: float, seed: int) -> bool:
        """Gather the sample; one process measures."""
        width, processes = self.stream.width, self.stream.processes
        self.owner = processes.assign_owner(MAX_TOKENS * width * self.module.units * self.module.units_inside)
        x_nd, z_nd, scale_n1, weight_n1 = processes.gather(torch.cat(self._samples)).split([width, width, 1, 1], 1)
        if processes.rank != self.owner:
            return False
        self._scale_n, weight_n, self._ridge = scale_n1[:, 0], weight_n1[:, 0], ridge
        self._seed = module_seed(seed, self.index, self.module.role)
        output_nd = self._error_units(z_nd, torch.arange(len(z_nd), device=z_nd.device))
        self._count = float(weight_n.sum(dtype=torch.float64))
        self._energy = float((output_nd.square().sum(1) * weight_n).sum(dtype=torch.float64)) / self._count
        self._routed = RoutedTokens(self._mixture, x_nd, output_nd, weight_n, self._error_units)
        return True

    def _error_units(self, y_md: Tensor, tokens_m: Tensor) -> Tensor:
        """Return outputs of some tokens in the units of errors, which are relative to the residual stream."""
        return self.norm.scale(y_md) * self._scale_n[tokens_m][:, None]

    def curve(self, axis: Axis) -> tuple[ErrorCurve, list[Cut]]:
        """Return the errors of unchanged weights, with the share of them that is left after the refit."""
        return self._expert_curve() if axis.name == EXPERTS else (self._channel_curve(), [])

    def _expert_curve(self) -> tuple[ErrorCurve, list[Cut]]:
        """Return the error curve of whole experts, and the cuts to probe."""
        module, experts = self.module, self._mixture.all_routed
        # If experts may not be removed, the curve has the dense mixture alone.
        stop = module.min_units if module.kind in self._kinds else module.units
        removal = expert_order(self._order, self._routed, stop, self._seed)
        errors = tuple(error / self._count for error in removal.errors)
        cuts, share = list[Cut](), 1.0
        for part in PROBED_SHARES:
            if number := round(len(removal.order) * part) // module.groups * module.groups:
                removed = torch.tensor(removal.order[:number], device=experts.device)
                kept = experts[torch.isin(experts, removed, invert=True)]
                cuts.append(self._cut(errors[number] - errors[0], kept))
                share = self._share_left(kept, None)
        return ErrorCurve(self.index, module.kind, EXPERTS, errors, self._energy, removal.order, share), cuts

    def _channel_curve(self) -> ErrorCurve:
        """Return the error curve of channels, of which every expert loses equally many."""
        sums, orders = channel_errors(self._routed)
        kept = {expert: order[len(order) // 2 :] for expert, order in orders.items()}
        share = self._share_left(self._mixture.all_routed, kept)
        errors = tuple(error / self._count for error in sums)
        return ErrorCurve(self.index, self.module.kind, EXPERT_CHANNELS, errors, self._energy, left_after_refit=share)

    def _share_left(self, experts: Tensor, channels: Mapping[int, Tensor] | None) -> float:
        """Return the share of a cut's error that is left after the refit; see `share_left_by_refit`."""
        return share_left_by_refit(self._routed, self._scale_n, self.norm.scale, experts, channels, self._ridge)

    def _cut(self, error: float, experts: Tensor) -> Cut:
        """Return a cut that keeps some experts, with unchanged weights."""
        return Cut(self.index, self.module, error, experts, self._scale_n.new_empty(0, 0))

    def removal_cut(self) -> Cut:
        """Return the cut that keeps no expert."""
        return self._cut(self._energy, self._mixture.all_routed[:0])

    def release(self) -> None:
        """Free the sample."""
        self._samples.clear()
        self.__dict__.pop("_routed", None)

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
    sums = [float((change.square().sum(1) * routed.weight_n).sum(dtype=torch.float64)) for change in changes]
    return tuple(np.interp(np.arange(size), counts, [0.0, *sums]).tolist()), orders
