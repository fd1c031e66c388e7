"""A sample: what a survey keeps of one module while the dense block runs, and the error curves that follow from it.

A module of the dense block needs sums alone (`secateur.survey.gram_estimator`); a mixture needs some of its tokens
(`secateur.survey.mixture_estimator`), as tokens are routed anew once experts are gone.

Shapes: n tokens of a batch, a inputs of the output projection, d residual width; b rows of t positions.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from secateur.model.axes import Axis
from secateur.model.rows import Batch
from secateur.model.structure import PrunableModule
from secateur.survey.curves import ErrorCurve
from secateur.survey.probes import Cut

PROBED_SHARES = (0.5,)
"""Shares of a module's units whose removal is probed, beside the removal of all."""


class ModuleActivations(NamedTuple):
    """What one run of a block shows of a module."""

    source: Tensor
    """The module's input, where it is asked for."""
    inner: Tensor
    """Input of the output projection; of a mixture, the mixture's."""
    output: Tensor
    """Output of the output projection (... x d); of a mixture, the mixture's."""


class CurveEstimator(ABC):
    """What is kept of one module.

    Attributes:
        index: the block.
        module: the attention, the feed-forward or the mixture.
        reads_source: whether the module's own input is asked for.
        owner: rank of the process that measures; the others find nothing, or the same.
    """

    index: int
    module: PrunableModule
    reads_source: bool = False
    owner: int = 0

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Axes along which units may leave, each of which has a curve."""
        return self.module.cut_axes

    @abstractmethod
    def add(self, seen: ModuleActivations, inverse_rms: Tensor | None, norms_n1: Tensor, at: Batch) -> None:
        """Add a batch.

        Args:
            inverse_rms: 1 / r of each output, where a norm stands behind the module.
            norms_n1: norms of the dense stream after the block, to which errors are relative.
        """

    @abstractmethod
    def probed(self, seen: ModuleActivations) -> Tensor:
        """Return what `output` needs of the rows to be probed."""

    @abstractmethod
    def reduce(self, ridge: float, seed: int) -> bool:
        """Add up what several processes have, and prepare for `curve`; return whether this process measures."""

    @abstractmethod
    def curve(self, axis: Axis) -> tuple[ErrorCurve, list[Cut]]:
        """Return the error curve of one axis, and the cuts along it that are to be probed."""

    @abstractmethod
    def whole(self) -> Cut:
        """Return the cut that takes the whole module."""

    @abstractmethod
    def release(self) -> None:
        """Give back what `curve` needs; `output` may still be called."""

    @abstractmethod
    def output(self, cut: Cut, rows: Tensor) -> Tensor:
        """Return the module's output at a cut (b x t x d), from what `probed` gave (b x t x ...)."""
