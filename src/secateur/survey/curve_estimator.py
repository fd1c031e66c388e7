"""Interface of estimators of error curves. An estimator collects activations of one module while the dense block runs.

A dense module needs only sums over tokens, such as Gram matrices (`secateur.survey.gram_estimator`). A mixture of
experts needs a sample of its tokens (`secateur.survey.mixture_estimator`), because tokens are routed to other experts
once some experts are removed.

Shapes: n tokens of a batch, a inputs of the output projection, d residual width, b rows of t positions.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from secateur.model.axes import Axis
from secateur.model.post_norm import PostNorm
from secateur.model.rows import Batch
from secateur.model.stream import FilledModule
from secateur.survey.curves import ErrorCurve
from secateur.survey.probes import Cut

PROBED_SHARES = (0.5,)
"""Shares of a module's units to remove in probes; one more probe removes the whole module."""


class ModuleActivations(NamedTuple):
    """Activations of one module on one batch."""

    module_input: Tensor
    """Input of the module (b x t x d); empty if the estimator does not need it."""
    projection_input: Tensor
    """Input of the output projection (b x t x a); for a mixture of experts, input of the mixture."""
    output: Tensor
    """Output of the output projection or of the mixture (b x t x d)."""


class CurveEstimator(ABC):
    """Estimator of the error curves of one module.

    Attributes:
        stream: The dense model.
        index: Index of the block.
        module: The description of the module: an attention, a feed-forward or a mixture of experts.
        norm: Norm between the output projection and the residual stream; neutral if there is none.
        needs_input: Whether the estimator needs the input of the module.
        owner: Rank of the process that measures.
    """

    needs_input: bool = False
    owner: int = 0

    def __init__(self, filled: FilledModule):
        self.stream, self.index, self.module = filled.stream, filled.index, filled.module
        self.norm = PostNorm(filled)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Axes along which units may be removed; there is one error curve for each axis."""
        return self.module.cut_axes

    @abstractmethod
    def add(
        self, activations: ModuleActivations, inverse_rms_bt1: Tensor | None, norms_n1: Tensor, batch: Batch
    ) -> None:
        """Add a batch of calibration rows.

        Args:
            activations: Activations of the module.
            inverse_rms_bt1: Reciprocal root mean square of each output (b x t x 1), if a norm follows the module.
            norms_n1: Norm of the dense stream after the block for each token; errors are relative to it.
            batch: Weight of the batch's tokens in errors and in the selection of units.
        """

    @abstractmethod
    def probe_inputs(self, activations: ModuleActivations) -> Tensor:
        """Return the part of the activations that `output_at` needs (b x t x ...)."""

    @abstractmethod
    def reduce(self, ridge: float, seed: int) -> bool:
        """Add up the sums of all processes and prepare for `curve`; return whether this process measures curves."""

    @abstractmethod
    def curve(self, axis: Axis) -> tuple[ErrorCurve, list[Cut]]:
        """Return the error curve along one axis, and the cuts along the axis to probe."""

    @abstractmethod
    def removal_cut(self) -> Cut:
        """Return the cut that removes the whole module."""

    @abstractmethod
    def release(self) -> None:
        """Free the memory that only `curve` needs; `output_at` may still be called."""

    @abstractmethod
    def output_at(self, cut: Cut, inputs: Tensor) -> Tensor:
        """Return the module's output at a cut (b x t x d), from the result of `probe_inputs` (b x t x ...)."""
