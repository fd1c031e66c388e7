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
from secateur.survey import curve_estimator
from secateur.survey.curve_estimator import CurveEstimator, ModuleActivations
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
        self._statistics: tuple[Statistics, Statistics | None] | None = None
        """Statistics for errors; and those for the order of removal, if they are separate."""

    def add(
        self, activations: ModuleActivations, inverse_rms_bt1: Tensor | None, norms_n1: Tensor, batch: Batch
    ) -> None:
        """Add a batch of calibration rows to the sums."""
        x_bta = activations.projection_input
        x_na = (x_bta if inverse_rms_bt1 is None else x_bta * inverse_rms_bt1).reshape(len(norms_n1), -1) / norms_n1
        if batch.weight:
            self._moments.update(x_na, weight=batch.weight)
        if batch.choice_weight and self._choice_moments is not None:
            self._choice_moments.update(x_na, weight=batch.choice_weight)
        if batch.choice_weight and self._input_moments is not None:
            self._input_moments.update(activations.module_input.reshape(len(norms_n1), -1), weight=batch.choice_weight)

    def probe_inputs(self, activations: ModuleActivations) -> Tensor:
        """Return the inputs of the output projection."""
        return activations.projection_input

    def reduce(self, ridge: float, seed: int) -> bool:
        """Add up the sums of all processes on the owner rank of the module, which measures the curves."""
        inputs, processes = self.module.units * self.module.size, self.stream.processes
        self.owner = processes.assign_owner(inputs**3)
        for sums in (self._moments, self._choice_moments, self._input_moments):
            if sums is not None:
                sums.reduce(processes, self.owner)
        if processes.rank != self.owner:
            return False
        stats = Statistics(
            module=self.module,
            tensors=self._tensors,
            weight_ao=self.norm.scale(output_weight(self.module, self._tensors)),
            moments=self._moments,
            input_moments=self._input_moments,
            ridge=ridge,
            target_is_old_output=True,
            seed=module_seed(seed, self.index, self.module.role),
        )
        scores = None if self._choice_moments is None else replace(stats, moments=self._choice_moments)
        self._statistics = stats, scores
        return True

    @property
    def _stats(self) -> Statistics:
        assert self._statistics is not None
        return self._statistics[0]

    @property
    def _energy(self) -> float:
        """Error once the whole module is removed."""
        return self._stats.normal.energy / self._moments.count

    def curve(self, axis: Axis) -> tuple[ErrorCurve, list[Cut]]:
        """Return the errors after the best refit along one axis; cuts are probed along the last axis only.

        One axis is enough, because the cost of an error depends little on which units cause it.
        """
        assert self._statistics is not None
        (stats, scores), module, count = self._statistics, self.module, self._moments.count
        if module.locked:
            # Units can only be removed all at once.
            return ErrorCurve(self.index, module.kind, axis.name, (0.0,), self._energy), []
        removed_together, probed = module.enclosing_units(axis.name), self._probed_numbers(axis)
        result = error_curve(
            self._criterion, stats, axis.name, 1, scores, [number * removed_together for number in probed]
        )
        errors = (result.errors[::removed_together] / count).tolist()
        cuts = []
        for number in probed:
            removed = result.order[: number * removed_together]
            kept = kept_inputs(module, remaining_units(module, axis.name, removed))
            weight = result.weights[number * removed_together]
            cuts.append(Cut(self.index, module, errors[number] - errors[0], kept.to(weight.device), weight))
        order = tuple(result.order.tolist())
        return ErrorCurve(self.index, module.kind, axis.name, tuple(errors), self._energy, order), cuts

    def _probed_numbers(self, axis: Axis) -> list[int]:
        """Return the numbers of units along an axis whose removal is probed, in ascending order."""
        if axis is not self.axes[-1]:
            return []
        return sorted({round(axis.units * share) for share in curve_estimator.PROBED_SHARES} - {0, axis.units})

    def removal_cut(self) -> Cut:
        """Return the cut that keeps no input of the output projection."""
        none = torch.empty(0, dtype=torch.long, device=self._stats.weight_ao.device)
        return Cut(self.index, self.module, self._energy, none, self._stats.weight_ao[none])

    def release(self) -> None:
        """Free the statistics."""
        self._statistics = None

    def output_at(self, cut: Cut, inputs: Tensor) -> Tensor:
        """Return the output of the refitted output projection at a cut."""
        z = inputs[..., cut.kept].float() @ self.norm.unscale(cut.weight_ao)
        return z + self._tensors[self.module.bias] if self.module.bias else z
