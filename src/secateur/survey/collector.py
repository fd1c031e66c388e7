"""Measurement of one module: activations are collected while the dense block runs, and error curves are computed
afterwards.

With several processes, each collects activations of its own rows. The owner rank of the module measures the curves and
broadcasts them.
"""

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from secateur.model.rows import Batch
from secateur.survey.curve_estimator import CurveEstimator, ModuleActivations
from secateur.survey.curves import ErrorCurve
from secateur.survey.probes import Cut


class Collector:
    """Collector of one module's activations, with the error curves that follow from them."""

    def __init__(self, estimator: CurveEstimator):
        self.stream, self.estimator, self.module = estimator.stream, estimator, estimator.module
        nothing = torch.empty(0)
        self._last = ModuleActivations(nothing, nothing, nothing)
        self._results = (list[ErrorCurve](), list[Cut]())
        self._probe_inputs: list[Tensor] = []
        """Inputs for the probes, one tensor per batch of the probe rows (b x t x ...)."""

    def watches(self) -> dict[str, Callable[[Tensor, Tensor], None]]:
        """Return functions that record inputs and outputs of the module's layers, by path of the layer."""
        watched: dict[str, Callable[[Tensor, Tensor], None]] = {}
        if self.estimator.needs_input:
            watched[self.module.input_layer] = self._record_input
        return watched | {self.module.output_layer: self._record_output}

    def _record_output(self, x: Tensor, z: Tensor) -> None:
        # In a mixture of experts, the layer that computes the output also has the module's input.
        module_input = x if self.module.input_layer == self.module.output_layer else self._last.module_input
        self._last = ModuleActivations(module_input, x, z)

    def _record_input(self, x: Tensor, _: Tensor) -> None:
        self._last = self._last._replace(module_input=x)

    def update(self, after: Tensor, batch: Batch) -> None:
        """Add the activations of the last run; `after` is the residual stream after the block (b x t x d)."""
        if not (batch.weight or batch.choice_weight):
            self._probe_inputs.append(self.estimator.probe_inputs(self._last).reshape(*after.shape[:-1], -1))
            return
        norm = self.estimator.norm
        norms = torch.linalg.vector_norm(norm.scale_stream(after).reshape(-1, after.shape[-1]), dim=1, keepdim=True)
        self.estimator.add(self._last, norm.inverse_rms(self._last.output), norms.clamp_min(1e-6), batch)

    def measure(self, ridge: float, seed: int) -> None:
        """Measure the curves and cuts that `results` returns; all processes must call it together."""
        if self.estimator.reduce(ridge, seed):
            measured = [self.estimator.curve(axis) for axis in self.estimator.axes]
            cuts = [cut for _, of_axis in measured for cut in of_axis]
            self._results = [curve for curve, _ in measured], [*cuts, self.estimator.removal_cut()]
        # The collected sums and tokens are larger than the module itself.
        self.estimator.release()

    def results(self) -> tuple[list[ErrorCurve], list[Cut]]:
        """Return the module's error curves, one for each axis, and the cuts to probe; the same in all processes."""
        processes, owner, (curves, cuts) = self.stream.processes, self.estimator.owner, self._results
        if processes.is_single:
            return curves, cuts
        raw, errors = processes.broadcast(lambda: [[asdict(one) for one in curves], [cut.error for cut in cuts]], owner)
        fields = ("kept", "weight_ao")
        tensors = {f"{number} {field}": getattr(cut, field) for number, cut in enumerate(cuts) for field in fields}
        tensors = processes.broadcast_tensors(tensors, owner, self.stream.device)
        return [ErrorCurve.of(one) for one in raw], [
            Cut(self.estimator.index, self.module, error, *(tensors[f"{number} {field}"] for field in fields))
            for number, error in enumerate(errors)
        ]

    def output_at(self, cut: Cut) -> Tensor:
        """Return the module's output at a cut on the probe rows (b x t x d)."""
        if not self._probe_inputs:
            return torch.empty(0, 1, self.stream.width, device=self.stream.device)
        return torch.cat([self.estimator.output_at(cut, inputs) for inputs in self._probe_inputs])
