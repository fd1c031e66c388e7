"""Error curves of a dense module: Gram matrices, and the error of the best refit at every width."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from secateur.criteria.order import error_curve, remaining_units
from secateur.criteria.registry import Criteria
from secateur.criteria.statistics import Statistics, module_seed
from secateur.model.axes import Axis
from secateur.model.rows import Batch
from secateur.model.stream import FilledModule
from secateur.model.surgery import kept_inputs, output_weight
from secateur.numerics.moments import Moments
from secateur.survey.curve_estimator import PROBED_SHARE, CurveEstimator
from secateur.survey.curves import ErrorCurve
from secateur.survey.probes import Cut


class GramEstimator(CurveEstimator):
    """Estimator of error curves from the Gram matrix of the output projection's input.

    Each token is divided by the norm of its residual stream, to which errors are relative.
    """

    def __init__(self, filled: FilledModule, criteria: Criteria, *, separate_choice: bool):
        """Start with empty sums.

        Args:
            filled: The module of the dense model.
            criteria: Criteria that determine the order in which units are removed.
            separate_choice: Whether the order is determined on other rows than those on which errors are measured.
        """
        super().__init__(filled)
        stream, module = filled.stream, filled.module
        self._criterion = criteria.of_module(filled.index, module.kind)
        self.needs_input = bool(module.channel_projections) and self._criterion.input_moments
        self._tensors: Mapping[str, Tensor] = filled.layer.state_dict()
        inputs = module.units * module.size
        self._moments = Moments(inputs, device=stream.device)
        self._choice_moments = Moments(inputs, device=stream.device) if separate_choice else None
        self._input_moments = Moments(stream.width, device=stream.device) if self.needs_input else None

    def add(self, inverse_rms_bt1: Tensor | None, norms_n1: Tensor, batch: Batch) -> None:
        """Add a batch of calibration rows to the sums."""
        x_bta = self.projection_input
        x_na = (x_bta if inverse_rms_bt1 is None else x_bta * inverse_rms_bt1).reshape(len(norms_n1), -1) / norms_n1
        if batch.weight:
            self._moments.update(x_na, weight=batch.weight)
        if batch.choice_weight and self._choice_moments is not None:
            self._choice_moments.update(x_na, weight=batch.choice_weight)
        if batch.choice_weight and self._input_moments is not None:
            self._input_moments.update(self.module_input.reshape(len(norms_n1), -1), weight=batch.choice_weight)

    def measure(self, ridge: float, seed: int) -> tuple[list[ErrorCurve], list[Cut]]:
        """Return the errors after the best refit along each axis, and cuts to half of the units and to none."""
        module, processes = self.module, self.stream.processes
        self.owner = processes.assign_owner((module.units * module.size) ** 3)
        for sums in (self._moments, self._choice_moments, self._input_moments):
            if sums is not None:
                sums.reduce(processes, self.owner)
        if processes.rank != self.owner:
            return [], []
        stats = Statistics(
            module=module,
            tensors=self._tensors,
            weight_ao=self.norm.scale(output_weight(module, self._tensors)),
            moments=self._moments,
            input_moments=self._input_moments,
            ridge=ridge,
            target_is_old_output=True,
            seed=module_seed(seed, self.index, module.role),
        )
        order_stats = None if self._choice_moments is None else replace(stats, moments=self._choice_moments)
        energy = stats.normal.energy / self._moments.count
        measured = [self._curve(axis, stats, order_stats, energy) for axis in module.cut_axes]
        none = torch.empty(0, dtype=torch.long, device=stats.weight_ao.device)
        removal = Cut(self.index, module, energy, none, stats.weight_ao[none])
        return [curve for curve, _ in measured], [*(cut for _, cuts in measured for cut in cuts), removal]

    def _curve(
        self, axis: Axis, stats: Statistics, order_stats: Statistics | None, energy: float
    ) -> tuple[ErrorCurve, list[Cut]]:
        """Return the error curve along one axis, and the cut along it; only the last axis has one.

        One axis is enough, because the cost of an error depends little on which units cause it.

        Args:
            axis: The axis.
            stats: Statistics for errors.
            order_stats: Statistics for the order of removal, if they are separate.
            energy: Error once the whole module is removed.
        """
        module = self.module
        if module.locked:
            # Units can only be removed all at once.
            return ErrorCurve(self.index, module.kind, axis.name, (0.0,), energy), []
        removed_together = module.enclosing_units(axis.name)
        number = round(axis.units * PROBED_SHARE) if axis is module.cut_axes[-1] else 0
        result = error_curve(self._criterion, stats, axis.name, order_stats, [number * removed_together])
        errors = (result.errors[::removed_together] / self._moments.count).tolist()
        curve = ErrorCurve(self.index, module.kind, axis.name, tuple(errors), energy, tuple(result.order.tolist()))
        cuts = []
        for removed, weight in result.weights.items():
            kept = kept_inputs(module, remaining_units(module, axis.name, result.order[:removed])).to(weight.device)
            cuts.append(Cut(self.index, module, errors[number] - errors[0], kept, weight))
        return curve, cuts

    def output_at(self, cut: Cut, inputs: Tensor) -> Tensor:
        """Return the output of the refitted output projection at a cut."""
        z = inputs[..., cut.kept].float() @ self.norm.unscale(cut.weight_ao)
        return z + self._tensors[self.module.bias] if self.module.bias else z
