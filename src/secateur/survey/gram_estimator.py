"""Curves of a module of the dense block: its second moments, and the error of the best refit at every width."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from secateur.criteria.order import error_curve, remaining_units
from secateur.criteria.registry import Criteria
from secateur.criteria.statistics import Statistics, module_seed
from secateur.model.axes import Axis
from secateur.model.post_norm import PostNorm
from secateur.model.rows import Batch
from secateur.model.stream import BlockStream
from secateur.model.structure import PrunableModule
from secateur.model.surgery import inner_entries, inner_weight
from secateur.numerics.moments import Moments
from secateur.survey import curve_estimator
from secateur.survey.curve_estimator import CurveEstimator, ModuleActivations
from secateur.survey.curves import ErrorCurve
from secateur.survey.probes import Cut


class GramEstimator(CurveEstimator):
    """Second moments of the output projection's input, each token relative to its own residual stream."""

    def __init__(
        self,
        stream: BlockStream,
        index: int,
        layer: nn.Module,
        module: PrunableModule,
        criteria: Criteria,
        *,
        apart: bool,
    ):
        """Start with empty sums.

        Args:
            criteria: the order in which units leave.
            apart: some rows measure errors and others decide the order.
        """
        self.stream, self.index, self.module = stream, index, module
        self._criterion = criteria.of_module(index, module.kind)
        self.reads_source = module.kind == "channels" and self._criterion.input_moments
        self._tensors: Mapping[str, Tensor] = layer.state_dict()
        self._norm = PostNorm(stream, index, layer, module)
        inner = module.units * module.size
        self._moments = Moments(inner, device=stream.device)
        self._scored = Moments(inner, device=stream.device) if apart else None
        self._source = Moments(stream.width, device=stream.device) if self.reads_source else None
        self._measured: tuple[Statistics, Statistics | None] | None = None

    def add(self, seen: ModuleActivations, inverse_rms: Tensor | None, norms_n1: Tensor, at: Batch) -> None:
        """Add a batch to the sums."""
        rows = (seen.inner if inverse_rms is None else seen.inner * inverse_rms).reshape(len(norms_n1), -1)
        rows = rows / norms_n1
        if at.weight:
            self._moments.update(rows, weight=at.weight)
        if at.score and self._scored is not None:
            self._scored.update(rows, weight=at.score)
        if at.score and self._source is not None:
            self._source.update(seen.source.reshape(len(norms_n1), -1), weight=at.score)

    def probed(self, seen: ModuleActivations) -> Tensor:
        """Return the inputs of the output projection."""
        return seen.inner

    def reduce(self, ridge: float, seed: int) -> bool:
        """Add up the sums of all processes at the module's owner, which measures."""
        inner, processes = self.module.units * self.module.size, self.stream.processes
        self.owner = processes.assign_owner(inner**3)
        for sums in (self._moments, self._scored, self._source):
            if sums is not None:
                sums.reduce(processes, self.owner)
        if processes.rank != self.owner:
            return False
        stats = Statistics(
            module=self.module,
            tensors=self._tensors,
            weight_ao=self._norm.scale(inner_weight(self.module, self._tensors)),
            moments=self._moments,
            input_moments=self._source,
            ridge=ridge,
            target_is_old_output=True,
            seed=module_seed(seed, self.index, self.module.role),
        )
        # Other rows may decide the order than those that measure errors.
        self._measured = stats, None if self._scored is None else replace(stats, moments=self._scored)
        return True

    @property
    def _stats(self) -> Statistics:
        assert self._measured is not None
        return self._measured[0]

    @property
    def _energy(self) -> float:
        """The error if the whole module went."""
        return self._stats.normal.energy / self._moments.count

    def curve(self, axis: Axis) -> tuple[ErrorCurve, list[Cut]]:
        """Return the errors after the best refit; the last axis is probed.

        One axis is enough: what an error costs depends little on which units made it.
        """
        assert self._measured is not None
        (stats, choice), module, count = self._measured, self.module, self._moments.count
        if module.locked:
            # All or nothing.
            return ErrorCurve(self.index, module.kind, axis.name, (0.0,), self._energy), []
        together, units = module.enclosing_units(axis.name), axis.units
        probed = (
            {round(units * share) for share in curve_estimator.PROBED_SHARES} - {0, units}
            if axis is self.axes[-1]
            else set()
        )
        found = error_curve(self._criterion, stats, axis.name, 1, choice, [gone * together for gone in probed])
        errors = (found.errors[::together] / count).tolist()
        cuts = []
        for gone in sorted(probed):
            kept = inner_entries(module, remaining_units(module, axis.name, found.order[: gone * together]))
            weight = found.weights[gone * together]
            cuts.append(Cut(self.index, module, errors[gone] - errors[0], kept.to(weight.device), weight))
        return ErrorCurve(
            self.index, module.kind, axis.name, tuple(errors), self._energy, tuple(found.order.tolist())
        ), cuts

    def whole(self) -> Cut:
        """Return the cut that leaves no input of the output projection."""
        none = torch.empty(0, dtype=torch.long, device=self._stats.weight_ao.device)
        return Cut(self.index, self.module, self._energy, none, self._stats.weight_ao[none])

    def release(self) -> None:
        """Give back the statistics."""
        self._measured = None

    def output(self, cut: Cut, rows: Tensor) -> Tensor:
        """Return the output of the refitted output projection."""
        z = rows[..., cut.kept].float() @ self._norm.unscale(cut.weight_ao)
        return z + self._tensors[self.module.bias] if self.module.bias else z
