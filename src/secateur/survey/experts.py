"""The curves of one mixture of experts: what its output loses as experts leave, or channels of all of them.

Tokens are kept while the dense block runs, and their experts compared behind it; see `secateur.criteria.experts`. Of
every expert those channels leave first whose part of its output has the least energy. The errors are those of unchanged
weights; how much of them is left behind the refit is estimated at one cut of each kind, the middle one.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.criteria.experts import TOKENS, Routed, expert_order
from secateur.criteria.statistics import module_seed
from secateur.model.kinds import KINDS
from secateur.model.mixture import Mixture
from secateur.model.post_norm import PostNorm
from secateur.model.rows import Batch
from secateur.model.stream import BlockStream
from secateur.model.structure import Depth2
from secateur.model.units.experts import EXPERT_CHANNELS, EXPERTS
from secateur.survey.collector import PROBED
from secateur.survey.curves import Curve
from secateur.survey.expert_refit import left_by_refit
from secateur.survey.probes import Cut

COUNTS = 16
"""How many numbers of channels errors are measured at."""


class ExpertsCollector:
    """Keeps some tokens of a mixture while the dense block runs; see `survey.collector.Collector`."""

    def __init__(
        self,
        stream: BlockStream,
        index: int,
        layer: nn.Module,
        module: Depth2,
        order: str,
        tokens: int,
        kinds: Sequence[str] = KINDS,
    ):
        """Start without tokens.

        Args:
            order: of the experts, by its name.
            tokens: that will come, in all processes.
            kinds: of units that may leave: experts, channels, or both.
        """
        self.stream, self.index, self.module, self.order = stream, index, module, order
        self.norm, self.mixture = PostNorm(stream, index, layer, module), Mixture(stream, layer, module)
        self._kinds, self._every = kinds, max(1, tokens // TOKENS)
        self._met = 0
        self._x = self._z = torch.empty(0)
        # One of several processes may have no tokens.
        none = torch.empty(0, stream.width, device=stream.device)
        self._kept = [(none, none, none[:, 0], none[:, 0])]
        self._found = (list[Curve](), list[Cut]())
        self.seen: list[Tensor] = []
        """The mixture's inputs of the rows to be probed (b x t x d)."""

    def watches(self) -> dict[str, Any]:
        """What to watch, by layer path."""
        if self.module.source == self.module.sink:
            return {self.module.sink: self._see}
        return {self.module.source: self._read, self.module.sink: lambda _, z: self._see(self._x, z)}

    def _see(self, x: Tensor, z: Tensor) -> None:
        self._x, self._z = x, z

    def _read(self, x: Tensor, _: Tensor) -> None:
        self._x = x

    def update(self, after: Tensor, at: Batch) -> None:
        """Keep what the last run has shown; `after` is the residual stream after the block (b, t, d)."""
        if not (at.weight or at.score):
            self.seen.append(self._x.reshape(after.shape))
            return
        width = after.shape[-1]
        norms = torch.linalg.vector_norm(self.norm.read(after).reshape(-1, width), dim=1)
        inverse = self.norm.inverse_rms(self._z)
        scale = norms.clamp_min(1e-6).reciprocal()
        scale = scale if inverse is None else scale * inverse.reshape(-1)
        some = torch.arange(-self._met % self._every, len(scale), self._every, device=scale.device)
        self._met += len(scale)
        x, z = self._x.reshape(-1, width)[some], self._z.reshape(-1, width)[some]
        self._kept.append((x, z, scale[some], torch.full_like(scale[some], at.score or at.weight)))

    def measure(self, ridge: float, seed: int) -> None:
        """Find the curve and the cuts, which `told` gives; all processes do it together."""
        x, z, scale, weight = map(torch.cat, zip(*self._kept, strict=True))
        team = self.stream.team

        def unit(y: Tensor, tokens: Tensor) -> Tensor:
            return self.norm.scale(y) * scale[tokens][:, None]

        own = unit(z, torch.arange(len(z), device=z.device))
        routed = Routed(self.mixture, x, own, weight, unit, team)
        module = self.module
        stop = module.least if "experts" in self._kinds else module.units
        found = expert_order(self.order, routed, stop, module_seed(seed, self.index, module.kind))
        count = team.total(float(weight.sum(dtype=torch.float64)))
        energy = team.total(float((own.square().sum(1) * weight).sum(dtype=torch.float64))) / count
        errors = tuple(error / count for error in found.errors)
        every, none, cuts, share = self.mixture.every, z.new_empty(0, 0), list[Cut](), 1.0
        for part in PROBED:
            if gone := round(len(found.order) * part) // module.groups * module.groups:
                alive = every[torch.isin(every, torch.tensor(found.order[:gone], device=every.device), invert=True)]
                cuts.append(Cut(self.index, module, errors[gone] - errors[0], alive, none))
                share = left_by_refit(routed, scale, self.norm.scale, alive, None, ridge)
        cuts.append(Cut(self.index, module, energy, every[:0], none))
        curves = [Curve(self.index, module.kind, EXPERTS, errors, energy, found.order, share)]
        if "channels" in self._kinds:
            lost, orders = channel_errors(routed)
            stay = {expert: order[len(order) // 2 :] for expert, order in orders.items()}
            share = left_by_refit(routed, scale, self.norm.scale, every, stay, ridge)
            lost = tuple(error / count for error in lost)
            curves.append(Curve(self.index, module.kind, EXPERT_CHANNELS, lost, energy, left=share))
        self._found = curves, cuts

    def told(self) -> tuple[list[Curve], list[Cut]]:
        """The mixture's curve, and the cuts to be probed."""
        return self._found

    def output(self, cut: Cut) -> Tensor:
        """What the mixture gives at a cut, on the rows to be probed (b x t x d)."""
        if not self.seen:
            return torch.empty(0, 1, self.stream.width, device=self.stream.device)
        x = torch.cat(self.seen)
        return self.mixture.output(x, cut.kept) if len(cut.kept) else torch.zeros_like(x)


def channel_errors(routed: Routed) -> tuple[tuple[float, ...], dict[int, Tensor]]:
    """Summed squared errors of the output once 0, 1, 2, ... channels of every expert have gone, and the order in each.

    They are measured at some counts, of all experts' losses together, and lie on a line between.
    """
    mixture, team = routed.mixture, routed.team
    module, inner, x = mixture.module, mixture.module.inner, routed.x_nd
    routes = mixture.route(x, mixture.every)
    every = torch.zeros((module.units + module.times) * inner, dtype=torch.float64, device=x.device)
    parts = mixture.parts(mixture.every)[0 if module.times or mixture.shared is None else 1 :]
    energies = {expert: every[expert * inner :][: len(mixture.weight(expert))] for expert in parts}
    for expert in parts:
        tokens, rows = mixture.gated(expert, x, routes)
        mean = (routed.weight_n[tokens][:, None] * rows.square()).sum(0, dtype=torch.float64)
        energies[expert] += mean * mixture.weight(expert).double().square().sum(1)
    team.add(every)
    orders = {expert: energy.argsort(stable=True) for expert, energy in energies.items()}
    counts = np.unique(np.linspace(0, inner, COUNTS + 1).round().astype(int)).tolist()
    # What has been lost so far, of every count.
    lost = [torch.zeros_like(routed.wanted_nd) for _ in counts[1:]]
    for expert, order in orders.items():
        tokens, rows = mixture.gated(expert, x, routes)
        total, weight = torch.zeros(len(tokens), x.shape[1], device=x.device), mixture.weight(expert)
        for place, (start, stop) in enumerate(itertools.pairwise(counts)):
            gone = order[start * len(order) // inner : stop * len(order) // inner]
            total += rows[:, gone] @ weight[gone]
            lost[place].index_add_(0, tokens, routed.unit(total, tokens))
    sums = [float((part.square().sum(1) * routed.weight_n).sum(dtype=torch.float64)) for part in lost]
    errors = [0.0, *(team.total(value) for value in sums)]
    return tuple(np.interp(np.arange(inner), counts, errors).tolist()), orders
