"""Estimators of error curves. An estimator collects activations of one module while the dense block runs, and measures
the module's error curves afterwards.

A dense module needs only sums over tokens, such as Gram matrices (`secateur.survey.gram_estimator`). A mixture of
experts needs a sample of its tokens (`secateur.survey.mixture_estimator`), because tokens are routed to other experts
once some experts are removed.

With several processes, each collects activations of its own rows. The owner rank of the module measures the curves and
broadcasts them.

Shapes: n tokens of a batch, a inputs of the output projection, d residual width, b rows of t positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from secateur.model.post_norm import PostNorm
from secateur.model.rows import Batch
from secateur.model.stream import FilledModule
from secateur.survey.curves import ErrorCurve
from secateur.survey.probes import Cut

PROBED_SHARE = 0.5
"""Share of a module's units that one probe removes; another probe removes the whole module."""


class CurveEstimator(ABC):
    """Estimator of the error curves of one module.

    Attributes:
        stream: The dense model.
        index: Index of the block.
        module: The description of the module: an attention, a feed-forward or a mixture of experts.
        norm: Norm between the output projection and the residual stream; neutral if there is none.
        needs_input: Whether the estimator needs the input of the module.
        owner: Rank of the process that measures.
        module_input: Input of the module in the last run (b x t x d); empty if the estimator does not need it.
        projection_input: Input of the output projection or of the mixture in the last run (b x t x a).
        output: Output of the output projection or of the mixture in the last run (b x t x d).
    """

    needs_input: bool = False
    owner: int = 0

    def __init__(self, filled: FilledModule):
        self.stream, self.index, self.module = filled.stream, filled.index, filled.module
        self.norm = PostNorm(filled)
        self.module_input = self.projection_input = self.output = torch.empty(0)
        self._probe_inputs: list[Tensor] = []
        """Inputs for the probes, one tensor per batch of the probe rows (b x t x ...)."""

    def watches(self) -> dict[str, Callable[[Tensor, Tensor], None]]:
        """Return functions that record inputs and outputs of the module's layers, by path of the layer."""
        watched: dict[str, Callable[[Tensor, Tensor], None]] = {}
        if self.needs_input:
            watched[self.module.input_layer] = self._record_input
        return watched | {self.module.output_layer: self._record_output}

    def _record_output(self, x: Tensor, z: Tensor) -> None:
        self.projection_input, self.output = x, z
        # In a mixture of experts, the layer that computes the output also has the module's input.
        if self.module.input_layer == self.module.output_layer:
            self.module_input = x

    def _record_input(self, x: Tensor, _: Tensor) -> None:
        self.module_input = x

    def update(self, after: Tensor, batch: Batch) -> None:
        """Add the activations of the last run; `after` is the residual stream after the block (b x t x d)."""
        if not (batch.weight or batch.choice_weight):
            inputs = self.module_input if self.module.experts_per_token else self.projection_input
            self._probe_inputs.append(inputs.reshape(*after.shape[:-1], -1))
            return
        norms = torch.linalg.vector_norm(self.norm.scale_stream(after).flatten(0, -2), dim=1, keepdim=True)
        self.add(self.norm.inverse_rms(self.output), norms.clamp_min(1e-6), batch)

    @abstractmethod
    def add(self, inverse_rms_bt1: Tensor | None, norms_n1: Tensor, batch: Batch) -> None:
        """Add the activations of a batch of calibration rows.

        Args:
            inverse_rms_bt1: Reciprocal root mean square of each output (b x t x 1), if a norm follows the module.
            norms_n1: Norm of the dense stream after the block for each token; errors are relative to it.
            batch: Weight of the batch's tokens in errors and in the selection of units.
        """

    @abstractmethod
    def measure(self, ridge: float, seed: int) -> tuple[list[ErrorCurve], list[Cut]]:
        """Return the error curves, one for each axis, and the cuts to probe; all processes must call it together.

        The owner rank measures, on the sums of all processes. The other processes return empty lists.
        """

    def broadcast(self, curves: list[ErrorCurve], cuts: list[Cut]) -> tuple[list[ErrorCurve], list[Cut]]:
        """Return the curves and cuts of the owner rank, in all processes."""
        processes = self.stream.processes
        if processes.is_single:
            return curves, cuts
        raw, errors = processes.broadcast(
            lambda: [[asdict(one) for one in curves], [cut.error for cut in cuts]], self.owner
        )
        fields = ("kept", "weight_ao")
        tensors = {f"{number} {field}": getattr(cut, field) for number, cut in enumerate(cuts) for field in fields}
        tensors = processes.broadcast_tensors(tensors, self.owner, self.stream.device)
        return [ErrorCurve.of(one) for one in raw], [
            Cut(self.index, self.module, error, *(tensors[f"{number} {field}"] for field in fields))
            for number, error in enumerate(errors)
        ]

    @abstractmethod
    def output_at(self, cut: Cut, inputs: Tensor) -> Tensor:
        """Return the module's output at a cut (b x t x d), from its inputs on probe rows (b x t x ...)."""

    def probed_output(self, cut: Cut) -> Tensor:
        """Return the module's output at a cut on all probe rows (b x t x d)."""
        if not self._probe_inputs:
            return torch.empty(0, 1, self.stream.width, device=self.stream.device)
        return torch.cat([self.output_at(cut, inputs) for inputs in self._probe_inputs])
