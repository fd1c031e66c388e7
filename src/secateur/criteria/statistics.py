"""Statistics of one module: everything that a criterion may read.

Shapes: a inputs of the output projection, o outputs (the residual width), u units.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from secateur.model.axes import ATTENTION
from secateur.model.structure import PrunableModule
from secateur.model.surgery import rows_of
from secateur.numerics.moments import Moments
from secateur.numerics.ridge import NormalEquations, normal_equations


@dataclass
class Statistics:
    """Weights and moments of one module."""

    module: PrunableModule
    tensors: Mapping[str, Tensor]
    """Tensors of the block in float32, as the module now computes with them."""
    weight_ao: Tensor
    """Weight of the output projection, inputs first. A norm after the projection is folded into its columns."""
    moments: Moments
    """Moments of the output projection's input, and of the target if there is one."""
    input_moments: Moments | None
    """Moments of the module's own input, if the criterion asks for them."""
    ridge: float
    """Strength of the penalty toward the old weights."""
    target_is_old_output: bool
    """Whether the target is the output of the old weights on the same inputs; `moments` then has no target."""
    seed: int
    """Seed of the criterion `random`."""
    ridge_centre_ao: Tensor | None = None
    """Weights toward which the ridge penalises, if not `weight_ao`."""

    @cached_property
    def normal(self) -> NormalEquations:
        """Penalised normal equations of the refit. The matrices of `moments` are moved into them, not copied."""
        (gram, cross), energy = self.moments.take(), self.moments.energy()
        target_cross = None if self.target_is_old_output else cross
        old = self.weight_ao if self.ridge_centre_ao is None else self.ridge_centre_ao
        return normal_equations(gram, target_cross, energy, old, self.ridge, overwrite=True)

    def per_unit(self, values_a: Tensor) -> Tensor:
        """Return the sum of the values over the inputs of each unit (u): a head's channels, or one channel."""
        return values_a.view(self.module.units, self.module.size).sum(1)


def module_seed(seed: int, index: int, role: str) -> int:
    """Return the seed of one module, from the run's seed, the block's index and the module's role in the block."""
    return (seed * 1_000_003 + index) * 2 + (role != ATTENTION)


def sum_by_unit(module: PrunableModule, tensors: Mapping[str, Tensor], function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the sum over all weights of each unit, without biases and attention sinks: (u), float64.

    Weights shared by several query heads (the key and value rows of their group) are divided equally among these heads.

    Args:
        module: The module.
        tensors: A value for each weight, by tensor name.
        function: Function from rows (rows x entries) to one value for each row: the rows of input projections and the
            columns of the output projection.
    """
    total = torch.zeros(module.units, dtype=torch.float64, device=tensors[module.output_projection.name].device)
    for slab in (*module.input_projections, module.output_projection):
        if slab.name.endswith(".bias") or tensors[slab.name].dim() < 2:
            continue
        sums = function(rows_of(slab, tensors).double()).view(slab.units, -1).sum(1)
        if (shared := module.units // slab.units) > 1:
            sums = (sums / shared).repeat_interleave(shared)
        total += sums
    return total
