"""Curves of a mixture: what its output loses as experts leave, or channels of all of them.

Tokens are kept while the dense block runs, and their experts compared behind it; see `secateur.criteria.experts`. Of
every expert those channels leave first whose part of its output has the least energy. The errors are those of unchanged
weights; how much of them is left behind the refit is estimated at one cut of each kind, the middle one.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from secateur.criteria.experts import MAX_TOKENS, expert_order
from secateur.criteria.routed_tokens import RoutedTokens
from secateur.criteria.statistics import module_seed
from secateur.model.axes import Axis
from secateur.model.kinds import KINDS
from secateur.model.mixture import Mixture
from secateur.model.post_norm import PostNorm
from secateur.model.rows import Batch
from secateur.model.stream import BlockStream
from secateur.model.structure import PrunableModule
from secateur.model.units.experts import EXPERT_CHANNELS, EXPERTS
from secateur.survey.curve_estimator import PROBED_SHARES, CurveEstimator, ModuleActivations
from secateur.survey.curves import ErrorCurve
from secateur.survey.expert_refit import share_left_by_refit
from secateur.survey.probes import Cut

COUNTS = 16
"""How many numbers of channels errors are measured at."""


class MixtureEstimator(CurveEstimator):
    """Some tokens of a mixture, with its outputs."""

    reads_source = True

    def __init__(
        self,
        stream: BlockStream,
        index: int,
        layer: nn.Module,
        module: PrunableModule,
        order: str,
        tokens: int,
        kinds: Sequence[str] = KINDS,
    ):
        """Start without tokens.

        Args:
            order: name of the order in which experts leave.
            tokens: number of tokens that will come, in all processes.
            kinds: kinds of units that may leave.
        """
        self.stream, self.index, self.module, self._order = stream, index, module, order
        self._norm, self._mixture = PostNorm(stream, index, layer, module), Mixture(stream, layer, module)
        self._kinds, self._every = kinds, max(1, tokens // MAX_TOKENS)
        self._come = 0
        # One of several processes may have no tokens.
        none = torch.empty(0, stream.width, device=stream.device)
        self._kept = [(none, none, none[:, 0], none[:, 0])]

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Experts, and channels of all of them where these may leave."""
        return tuple(axis for axis in self.module.axes if axis.name == EXPERTS or axis.kind in self._kinds)

    def add(self, seen: ModuleActivations, inverse_rms: Tensor | None, norms_n1: Tensor, at: Batch) -> None:
        """Keep tokens, spaced evenly."""
        width, scale = self.stream.width, norms_n1[:, 0].reciprocal()
        scale = scale if inverse_rms is None else scale * inverse_rms.reshape(-1)
        some = torch.arange(-self._come % self._every, len(scale), self._every, device=scale.device)
        self._come += len(scale)
        x, z = seen.source.reshape(-1, width)[some], seen.output.reshape(-1, width)[some]
        self._kept.append((x, z, scale[some], torch.full_like(scale[some], at.score or at.weight)))

    def probed(self, seen: ModuleActivations) -> Tensor:
        """Return the mixture's inputs."""
        return seen.source

    def reduce(self, ridge: float, seed: int) -> bool:
        """Prepare the tokens; all processes measure together."""
        x, z, scale, weight = map(torch.cat, zip(*self._kept, strict=True))
        self._scale, self._ridge = scale, ridge
        self._seed = module_seed(seed, self.index, self.module.role)
        own = self._unit(z, torch.arange(len(z), device=z.device))
        processes = self.stream.processes
        self._count = processes.total(float(weight.sum(dtype=torch.float64)))
        energy = processes.total(float((own.square().sum(1) * weight).sum(dtype=torch.float64)))
        self._energy = energy / self._count
        self._routed = RoutedTokens(self._mixture, x, own, weight, self._unit, processes)
        return True

    def _unit(self, y_md: Tensor, tokens: Tensor) -> Tensor:
        """Return outputs of some tokens in the units in which errors count."""
        return self._norm.scale(y_md) * self._scale[tokens][:, None]

    def curve(self, axis: Axis) -> tuple[ErrorCurve, list[Cut]]:
        """Return the errors of unchanged weights, and the share of them that is left behind the refit."""
        return self._experts() if axis.name == EXPERTS else self._channels()

    def _experts(self) -> tuple[ErrorCurve, list[Cut]]:
        """Return the curve of whole experts, in the order in which they leave."""
        module, every = self.module, self._mixture.every
        stop = module.min_units if "experts" in self._kinds else module.units
        found = expert_order(self._order, self._routed, stop, self._seed)
        errors, cuts, share = tuple(error / self._count for error in found.errors), list[Cut](), 1.0
        for part in PROBED_SHARES:
            if gone := round(len(found.order) * part) // module.groups * module.groups:
                alive = every[torch.isin(every, torch.tensor(found.order[:gone], device=every.device), invert=True)]
                cuts.append(self._cut(errors[gone] - errors[0], alive))
                share = self._left(alive, None)
        return ErrorCurve(self.index, module.kind, EXPERTS, errors, self._energy, found.order, share), cuts

    def _channels(self) -> tuple[ErrorCurve, list[Cut]]:
        """Return the curve of channels, as many of each expert."""
        lost, orders = channel_errors(self._routed)
        stay = {expert: order[len(order) // 2 :] for expert, order in orders.items()}
        share = self._left(self._mixture.every, stay)
        errors = tuple(error / self._count for error in lost)
        return ErrorCurve(
            self.index, self.module.kind, EXPERT_CHANNELS, errors, self._energy, left_after_refit=share
        ), []

    def _left(self, alive: Tensor, stay: Mapping[int, Tensor] | None) -> float:
        """Return the share of a cut's error that is left behind the refit."""
        return share_left_by_refit(self._routed, self._scale, self._norm.scale, alive, stay, self._ridge)

    def _cut(self, error: float, alive: Tensor) -> Cut:
        """Return a cut to some experts, whose weights are unchanged."""
        return Cut(self.index, self.module, error, alive, self._scale.new_empty(0, 0))

    def whole(self) -> Cut:
        """Return the cut that leaves no expert."""
        return self._cut(self._energy, self._mixture.every[:0])

    def release(self) -> None:
        """Give back the tokens."""
        self._kept.clear()
        del self._routed

    def output(self, cut: Cut, rows: Tensor) -> Tensor:
        """Return the mixture's output with some experts alone."""
        return self._mixture.output(rows, cut.kept) if len(cut.kept) else torch.zeros_like(rows)


def channel_errors(routed: RoutedTokens) -> tuple[tuple[float, ...], dict[int, Tensor]]:
    """Summed squared errors of the output once 0, 1, 2, ... channels of every expert have gone, and the order in each.

    They are measured at some counts, of all experts' losses together, and lie on a line between.
    """
    mixture, processes = routed.mixture, routed.processes
    module, inner, x = mixture.module, mixture.module.units_inside, routed.x_nd
    routes = mixture.route(x, mixture.every)
    every = torch.zeros((module.units + module.shared_multiple) * inner, dtype=torch.float64, device=x.device)
    parts = mixture.parts(mixture.every)[0 if module.shared_multiple or mixture.shared is None else 1 :]
    energies = {expert: every[expert * inner :][: len(mixture.weight(expert))] for expert in parts}
    for expert in parts:
        tokens, rows = mixture.gated(expert, x, routes)
        mean = (routed.weight_n[tokens][:, None] * rows.square()).sum(0, dtype=torch.float64)
        energies[expert] += mean * mixture.weight(expert).double().square().sum(1)
    processes.all_reduce(every)
    orders = {expert: energy.argsort(stable=True) for expert, energy in energies.items()}
    counts = np.unique(np.linspace(0, inner, COUNTS + 1).round().astype(int)).tolist()
    # What has been lost so far, of every count.
    lost = [torch.zeros_like(routed.target_nd) for _ in counts[1:]]
    for expert, order in orders.items():
        tokens, rows = mixture.gated(expert, x, routes)
        total, weight = torch.zeros(len(tokens), x.shape[1], device=x.device), mixture.weight(expert)
        for place, (start, stop) in enumerate(itertools.pairwise(counts)):
            gone = order[start * len(order) // inner : stop * len(order) // inner]
            total += rows[:, gone] @ weight[gone]
            lost[place].index_add_(0, tokens, routed.to_error_units(total, tokens))
    sums = [float((part.square().sum(1) * routed.weight_n).sum(dtype=torch.float64)) for part in lost]
    errors = [0.0, *(processes.total(value) for value in sums)]
    return tuple(np.interp(np.arange(inner), counts, errors).tolist()), orders
