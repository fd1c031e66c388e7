"""One module's curves: its moments, summed while the dense block runs, and what they say of each width.

Of several processes each sums its own rows; one of them, the module's owner, measures, and tells the others.
"""

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.criteria.order import error_curve, survivors
from secateur.criteria.registry import Criteria, Criterion
from secateur.criteria.statistics import Statistics, module_seed
from secateur.model.post_norm import PostNorm
from secateur.model.rows import Batch
from secateur.model.stream import BlockStream
from secateur.model.structure import Depth2
from secateur.model.surgery import inner_entries, inner_weight
from secateur.numerics.moments import Moments
from secateur.survey.curves import Curve
from secateur.survey.probes import Cut

PROBED = (0.5,)
"""Shares of a module's units whose removal is probed, beside the removal of all."""


class Collector:
    """Sums one module's moments while the dense block runs."""

    def __init__(
        self, stream: BlockStream, index: int, layer: nn.Module, module: Depth2, criteria: Criteria, *, apart: bool
    ):
        """Start with empty sums.

        Args:
            criteria: the order in which units leave.
            apart: some rows measure errors and others decide the order.
        """
        self.stream, self.index, self.module = stream, index, module
        self._criterion = criteria.module(index, module.kind)
        inputs = module.kind == "channels" and self._criterion.inputs
        self.tensors: dict[str, Tensor] = layer.state_dict()
        self.norm = PostNorm(stream, index, layer, self.module)
        self.moments = Moments(self.module.units * self.module.size, device=stream.device)
        self.scored = Moments(self.module.units * self.module.size, device=stream.device) if apart else None
        """Of the rows that decide the order, where those are others."""
        self.inputs = Moments(stream.width, device=stream.device) if inputs else None
        self.sink = self.source = torch.empty(0)
        self.scale: Tensor | None = None
        self._owner, self._found = 0, (list[Curve](), list[Cut]())
        self.seen: list[Tensor] = []
        """Level-2 inputs of the rows to be probed (b x t x a)."""

    def watches(self) -> dict[str, Any]:
        """What to watch, by layer path."""
        result: dict[str, Any] = {self.module.sink: self._sink}
        if self.inputs is not None:
            result[self.module.source] = self._source
        return result

    def _sink(self, x: Tensor, z: Tensor) -> None:
        self.sink, self.scale = x, self.norm.inverse_rms(z)

    def _source(self, x: Tensor, _: Tensor) -> None:
        self.source = x

    def update(self, after: Tensor, at: Batch) -> None:
        """Add what the last run has shown; `after` is the residual stream after the block (b, t, d)."""
        if not (at.weight or at.score):
            self.seen.append(self.sink.reshape(*after.shape[:-1], -1))
            return
        norms = torch.linalg.vector_norm(self.norm.read(after).reshape(-1, after.shape[-1]), dim=1, keepdim=True)
        rows = (self.sink if self.scale is None else self.sink * self.scale).reshape(len(norms), -1)
        rows = rows / norms.clamp_min(1e-6)
        if at.weight:
            self.moments.update(rows, weight=at.weight)
        if at.score and self.scored is not None:
            self.scored.update(rows, weight=at.score)
        if at.score and self.inputs is not None:
            self.inputs.update(self.source.reshape(-1, after.shape[-1]), weight=at.score)

    def measure(self, ridge: float, seed: int) -> None:
        """Let the module's owner find the curves and the cuts, which `told` gives."""
        inner, team = self.module.units * self.module.size, self.stream.team
        self._owner = team.owner(inner**3)
        for sums in (self.moments, self.scored, self.inputs):
            if sums is not None:
                sums.reduce(team, self._owner)
        if team.rank != self._owner:
            return
        stats = Statistics(
            module=self.module,
            tensors=self.tensors,
            weight_ao=self.norm.scale(inner_weight(self.module, self.tensors)),
            moments=self.moments,
            inputs=self.inputs,
            ridge=ridge,
            own_target=True,
            seed=module_seed(seed, self.index, self.module.kind),
        )
        apart = None if self.scored is None else replace(stats, moments=self.scored)
        self._found = _measured(self.index, self._criterion, stats, apart)

    def told(self) -> tuple[list[Curve], list[Cut]]:
        """The module's curves, one for each way in which its units may leave together, and the cuts to be probed."""
        team, (curves, cuts) = self.stream.team, self._found
        if team.alone:
            return curves, cuts
        raw, errors = team.told(lambda: [[asdict(one) for one in curves], [cut.error for cut in cuts]], self._owner)
        tensors = {f"{n} {what}": getattr(cut, what) for n, cut in enumerate(cuts) for what in ("kept", "weight_ao")}
        tensors = team.shared(tensors, self._owner, self.stream.device)
        return [Curve.of(one) for one in raw], [
            Cut(self.index, self.module, error, tensors[f"{n} kept"], tensors[f"{n} weight_ao"])
            for n, error in enumerate(errors)
        ]

    def output(self, cut: Cut) -> Tensor:
        """What level 2 yields at a cut, on the rows to be probed (b x t x d)."""
        weight = self.norm.unscale(cut.weight_ao)
        if not self.seen:
            return weight.new_empty(0, 1, weight.shape[1])
        if len(self.seen) > 1:
            self.seen = [torch.cat(self.seen)]
        z = self.seen[0][..., cut.kept].float() @ weight
        return z + self.tensors[self.module.bias] if self.module.bias else z


def _measured(
    index: int, criterion: Criterion, stats: Statistics, choice: Statistics | None
) -> tuple[list[Curve], list[Cut]]:
    """See `Collector.told`.

    `choice` has the statistics that decide the order in which units leave, where those are others.
    """
    module, count = stats.module, stats.moments.count
    curves: list[Curve] = []
    cuts: list[Cut] = []
    none = torch.empty(0, dtype=torch.long, device=stats.weight_ao.device)
    energy = stats.normal.energy / count
    everything = Cut(index, module, energy, none, stats.weight_ao[none])
    if module.locked:
        # All or nothing.
        curves = [Curve(index, module.kind, axis.name, (0.0,), energy) for axis in module.cut_axes]
        return curves, [everything]
    for axis in module.cut_axes:
        together, units = module.rounds(axis.name), axis.units
        # One way is enough: what an error costs depends little on which units made it.
        probed = {round(units * share) for share in PROBED} - {0, units} if axis is module.cut_axes[-1] else set()
        found = error_curve(criterion, stats, axis.name, 1, choice, [gone * together for gone in probed])
        errors = (found.errors[::together] / count).tolist()
        curves.append(Curve(index, module.kind, axis.name, tuple(errors), energy, tuple(found.order.tolist())))
        for gone in sorted(probed):
            kept = inner_entries(module, survivors(module, axis.name, found.order[: gone * together]))
            weight = found.weights[gone * together]
            cuts.append(Cut(index, module, errors[gone] - errors[0], kept.to(weight.device), weight))
    return curves, [*cuts, everything]
