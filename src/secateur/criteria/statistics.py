"""What a criterion may look at: the statistics of one module, and nothing else."""

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
    """One module's weights and second moments."""

    module: PrunableModule
    tensors: Mapping[str, Tensor]
    """The block's tensors, float32, as the module now computes with them."""
    weight_ao: Tensor
    """Level-2 weight, inner axis first, columns scaled by the norm after it where there is one."""
    moments: Moments
    """Of the level-2 input, and of its cross moment with the target where there is one."""
    input_moments: Moments | None
    """Of the module's input; present if the criterion needs it."""
    ridge: float
    target_is_old_output: bool
    """The target is what the dense weight yields on these very inputs; there is no cross moment."""
    seed: int
    ridge_centre_ao: Tensor | None = None
    """What the refit is pulled to, where that is not `weight_ao`."""

    @cached_property
    def normal(self) -> NormalEquations:
        """The penalised normal equations of the module's refit; takes the sums over from the moments."""
        (gram, cross), energy = self.moments.take(), self.moments.energy()
        old = self.weight_ao if self.ridge_centre_ao is None else self.ridge_centre_ao
        return normal_equations(
            gram, None if self.target_is_old_output else cross, energy, old, self.ridge, overwrite=True
        )

    def per_unit(self, entries_a: Tensor) -> Tensor:
        """Sum over the level-2 inputs of each unit: a head's channels, or a channel itself."""
        return entries_a.view(self.module.units, self.module.size).sum(1)

    def unit_sums(self, function: str) -> Tensor:
        """Sum of `abs` or `square` over all weights of each unit, level 1 and 2.

        What a group of query heads shares (its key and value rows) counts in equal parts for each of them.
        """
        return sum_by_unit(self.module, self.tensors, lambda part: getattr(part, function)().sum(1))


def module_seed(seed: int, index: int, role: str) -> int:
    """Return a seed for the module of a block in a role, another one for each."""
    return (seed * 1_000_003 + index) * 2 + (role != ATTENTION)


def sum_by_unit(module: PrunableModule, tensors: Mapping[str, Tensor], function: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum over all weights of each unit, level 1 and 2, biases and sinks left out: (units), float64.

    Args:
        module: whose units.
        tensors: a value for each weight, by tensor name.
        function: from the unit's rows (rows x others) to one value each; rows of level 1, columns of level 2.

    What a group of query heads shares (its key and value rows) counts in equal parts for each of them.
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
