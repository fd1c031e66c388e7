"""Choose a module's units and refit what is left, from statistics alone.

`refit` solves level 2 for the error-aware target, and in the feed-forward level 1 along with it (`fit/tangent.py`);
`paper` first refits level 1 to the dense level-1 outputs, then level 2 to the dense level-2 outputs (Algorithms 1, 3
and 4 of Greedy Output Approximation). `before` refits level 2 of all units ahead of the choice, so that the criterion
sees repaired weights; `after` refits the kept ones. `bias` leaves the weights and adds to the level-2 bias what the
removed units gave on average (FLAP); `none` leaves everything.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.model.structure import Depth2
from secateur.numerics.moments import Moments
from secateur.numerics.ridge import Normal, least_squares, normal_equations


@dataclass(frozen=True)
class Recovery:
    """How a module is repaired."""

    method: str = "refit"
    when: str = "after"
    """Of `paper`: level 2 is refitted `before` the choice of units, `after` it, or `both`."""
    ridge: float = 0.3
    level1: int = 2
    """Of `refit`: steps of conjugate gradients by which level 1 of the feed-forward is fitted along; 0 leaves it."""
    usual: float = 1.0
    """Of `refit`: a token counts half where the squared error that it inherits is so many times the median; infinite:
    all alike."""

    @property
    def fits(self) -> bool:
        """Weights get new values."""
        return self.method in ("refit", "paper")

    @property
    def fits_level1(self) -> bool:
        """Level 1 of the feed-forward is fitted along with level 2."""
        return self.method == "refit" and self.level1 > 0

    @property
    def before(self) -> bool:
        """Refit all units ahead of the choice."""
        return self.method == "paper" and self.when in ("before", "both")

    @property
    def after(self) -> bool:
        """Refit the kept units."""
        return self.method == "refit" or (self.method == "paper" and self.when in ("after", "both"))


class Fit(NamedTuple):
    """What least squares found for a level-2 layer."""

    weight_ko: Tensor
    """Of the kept inputs, in residual units."""
    bias: Tensor | None
    error: float
    """||XW - T||^2, the penalty left out."""
    plain: float = math.nan
    """The same with the old weights, where it was asked for."""


def fit_level2(moments: Moments, normal: Normal, keep: Tensor) -> Fit:
    """Best level-2 weights of the kept inputs, and the intercept (o) if the moments are centred."""
    weight, error = least_squares(normal, keep)
    return Fit(weight, intercept(moments, weight, keep) if moments.centre else None, error)


def intercept(moments: Moments, weight_ao: Tensor, keep: Tensor) -> Tensor:
    """The bias (o) with which the mean output is the mean target."""
    return (moments.mean_o - moments.mean_a[keep] @ weight_ao.double()).float()


def compensation(moments: Moments, weight_ao: Tensor, keep: Tensor, bias_o: Tensor | None) -> Tensor:
    """The bias (o) with which the kept inputs give the mean output of all inputs, weights unchanged.

    Inputs are those that the moments were taken of. In a fit that is the pruned stream, so that the
    mean is right where the module will stand; FLAP itself takes its means from the dense model.
    """
    gone = torch.ones(weight_ao.shape[0], dtype=torch.bool, device=weight_ao.device)
    gone[keep] = False
    shift = moments.mean_a[gone] @ weight_ao[gone].double()
    return (shift if bias_o is None else bias_o.double() + shift).float()


def fit_level1(module: Depth2, tensors: Mapping[str, Tensor], inputs: Moments, ridge: float) -> dict[str, Tensor]:
    """Level-1 weights and biases that bring the pruned stream's input to the dense level-1 outputs.

    `inputs` holds the Gram matrix of the module's input in the pruned stream and its cross moment with the input
    in the dense stream, X_p'X_d: the dense outputs are linear in the latter, so this serves all level-1 layers.
    """
    result: dict[str, Tensor] = {}
    # Slabs of one tensor share its axis and its bias.
    slabs = {slab.name: slab for slab in module.level1 if slab.name.endswith(".weight")}
    everything = torch.arange(inputs.gram().shape[0], device=inputs.gram().device)
    for name, slab in slabs.items():
        old = tensors[name].movedim(slab.axis, 1)
        cross = inputs.cross() @ old
        weight, _ = least_squares(normal_equations(inputs.gram(), cross, 0.0, old, ridge), everything)
        result[name] = weight.movedim(1, slab.axis).contiguous()
        if slab.bias in tensors:
            shift = inputs.mean_o @ old.double() - inputs.mean_a @ weight.double()
            result[slab.bias] = (tensors[slab.bias].double() + shift).float()
    return result
