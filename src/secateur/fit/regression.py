"""The regression of one module's output projection: its rows, whatever they come from.

A module of the dense block has so many rows that they are run through the block batch by batch
(`secateur.fit.block_regression`). An expert has its gate times its input, on the tokens routed to it, in memory already
(`secateur.fit.expert_regression`). What is done with the rows is the same for both (`secateur.fit.module`).

Shapes: n rows, a inputs of the output projection, k of them kept, d residual width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.criteria.registry import Criterion
from secateur.fit.input_projections import Part
from secateur.fit.output_projection import OutputFit
from secateur.fit.recovery import Recovery
from secateur.model.post_norm import PostNorm
from secateur.model.stream import BlockStream
from secateur.model.structure import PrunableModule
from secateur.model.surgery import inner_weight, stored_weight
from secateur.numerics.moments import Moments

AddPart = Callable[[Part, Tensor, Tensor], None]
"""Takes a part of a linearised module, the residual of its rows (n x d), and the root of each token's weight (n x 1);
residual and part are weighted by that root."""


@dataclass(frozen=True)
class Sums:
    """Second moments of a module's rows with their target; of several processes, its owner has those of all rows."""

    entries: Tensor
    """Inputs of the output projection that are summed over, ascending."""
    fitted: Moments
    """By token weight."""
    scored: Moments
    """By each token's weight in the choice of units; the same object as `fitted` where both weights are equal."""
    source: Moments | None = None
    """Of the module's own input, where the criterion asks for it."""

    def among(self, kept: Tensor) -> Tensor:
        """Return the places of kept inputs among those summed over."""
        return torch.searchsorted(self.entries, kept)

    def weights(self, old_ad: Tensor) -> Tensor:
        """Return the rows of a weight for the inputs that are summed over."""
        return old_ad if len(old_ad) == len(self.entries) else old_ad[self.entries]


class Regression(ABC):
    """Rows of one module, their target and token weights.

    Attributes:
        stream: the model.
        module: the module that is fitted.
        norm: the norm between the output projection and the residual stream, if there is one.
        recovery: how this module is fitted: its ridge is raised where tokens are few.
        owner: rank of the process that solves the module, of several.
        seed: for the criterion `random`.
        tokens: number of tokens that count in the fit, in all processes.
        fits_bias: whether the bias of the output projection is part of the fit.
        reports: whether the errors of old weights are asked for; they cost a product.
    """

    stream: BlockStream
    module: PrunableModule
    norm: PostNorm
    recovery: Recovery
    owner: int
    seed: int
    tokens: int
    fits_bias: bool
    reports: bool

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """The module's tensors in float32, as it now computes with them."""

    @property
    def weight(self) -> Tensor:
        """The weight of the output projection (a x d), as it is stored."""
        return inner_weight(self.module, self.tensors)

    @abstractmethod
    def criterion(self) -> Criterion:
        """Return the criterion by which units are chosen."""

    @abstractmethod
    def collect(self, keep: tuple[int, ...] | None = None) -> Sums:
        """Run the module up to its output projection, and sum over the inputs of all units or of kept ones.

        With kept units nothing is summed for a choice.
        """

    @abstractmethod
    def linearised(
        self, sums: Sums, kept: Tensor, fit: OutputFit, add: AddPart
    ) -> AbstractContextManager[Callable[[], Iterable[Part]]]:
        """Linearise the module at a fit of its output projection, and give each part of its rows to `add`.

        Inside the context, a function gives the same parts anew.
        """

    @abstractmethod
    def change(self, tensors: dict[str, Tensor]) -> None:
        """Let the module compute with new tensors, rounded as they will be written."""

    def stored(self, weight_ad: Tensor) -> dict[str, Tensor]:
        """Return the output projection as a tensor, by its name in `tensors`, from a weight in the errors' units."""
        return {self.module.output_projection.name: stored_weight(self.module, self.norm.unscale(weight_ad))}
