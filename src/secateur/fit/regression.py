"""Regression of one module's output projection: rows X of its inputs, targets T and token weights.

    minimise over W   sum_n w_n ||x_n W - t_n||^2 + ridge * (distance of W from the old weights)

Rows come from two kinds of modules. The rows of an attention or a feed-forward are too many for memory, and are
streamed through the block batch by batch (`secateur.fit.block_regression`). The rows of an expert, its gate times its
inputs on the tokens routed to it, are in memory already (`secateur.fit.expert_regression`). `secateur.fit.module`
treats both alike.

Shapes: n tokens, a inputs of the output projection, k kept inputs, d residual width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.criteria.registry import Criterion
from secateur.fit.input_projections import TangentRows
from secateur.fit.output_projection import OutputFit
from secateur.fit.recovery import Recovery
from secateur.model.post_norm import PostNorm
from secateur.model.stream import BlockStream
from secateur.model.structure import PrunableModule
from secateur.model.surgery import output_weight, stored_weight
from secateur.numerics.moments import Moments

AddRows = Callable[[TangentRows, Tensor, Tensor], None]
"""Function that takes some rows of a linearised module, their residuals (n x d), and the root of each token weight
(n x 1). Rows and residuals are multiplied by that root."""


@dataclass(frozen=True)
class ModuleMoments:
    """Moments of a module's rows and targets. With several processes, the matrices are at the owner rank."""

    entries: Tensor
    """Inputs of the output projection that the moments are taken of, ascending."""
    fit: Moments
    """Moments with the token weights of the fit."""
    choice: Moments
    """Moments with the token weights of the choice of units; the same object as `fit` if the weights are equal."""
    module_input: Moments | None = None
    """Moments of the module's own input, if the criterion asks for them."""

    def positions(self, kept: Tensor) -> Tensor:
        """Return the positions of some inputs among `entries`."""
        return torch.searchsorted(self.entries, kept)

    def rows(self, weight_ad: Tensor) -> Tensor:
        """Return the rows of a weight that belong to `entries`."""
        return weight_ad if len(weight_ad) == len(self.entries) else weight_ad[self.entries]


class Regression(ABC):
    """Rows, targets and token weights of one module.

    Attributes:
        stream: The model.
        module: The module that is fitted.
        norm: Norm between the output projection and the residual stream; neutral if there is none.
        recovery: Recovery of this module; its ridge is higher if tokens are few.
        owner: Rank of the process that solves the normal equations.
        seed: Seed of the criterion `random`.
        tokens: Number of tokens with a weight in the fit, in all processes.
        fits_inputs: Whether the input projections may be fitted.
        fits_bias: Whether the bias of the output projection is fitted.
    """

    stream: BlockStream
    module: PrunableModule
    norm: PostNorm
    recovery: Recovery
    owner: int
    seed: int
    tokens: int
    fits_inputs: bool
    fits_bias: bool

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """Tensors of the module in float32, as it now computes with them."""

    @property
    def weight(self) -> Tensor:
        """Weight of the output projection (a x d), as stored."""
        return output_weight(self.module, self.tensors)

    @abstractmethod
    def criterion(self) -> Criterion:
        """Return the criterion by which units are chosen."""

    @abstractmethod
    def collect(self, keep: tuple[int, ...] | None = None) -> ModuleMoments:
        """Run the module up to its output projection, and return the moments of its rows.

        Args:
            keep: Units whose inputs are summed over; by default all units, with moments for the choice of units.
        """

    @abstractmethod
    def linearised(
        self, moments: ModuleMoments, kept: Tensor, output: OutputFit, add: AddRows
    ) -> AbstractContextManager[Callable[[], Iterable[TangentRows]]]:
        """Linearise the module at a fit of its output projection, and call `add` with all rows, part by part.

        Inside the context, the returned function yields the same parts again.
        """

    @abstractmethod
    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Let the module compute with new tensors, rounded as they are written."""

    def as_tensor(self, weight_ad: Tensor) -> dict[str, Tensor]:
        """Return the output projection as a stored tensor, by its name, from a weight in error units."""
        return {self.module.output_projection.name: stored_weight(self.module, self.norm.unscale(weight_ad))}
