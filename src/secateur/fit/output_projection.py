"""Fit of one module's output projection, from moments alone.

    W_K = argmin ||X_K W_K - T||^2 + ridge penalty        least squares over the kept inputs K
    b   = mean(t) - mean(x_K) W_K                         intercept, if a bias is fitted
    b   = b_old + mean(x_R) W_R                           bias compensation for the removed inputs R, weights unchanged

Shapes: a inputs of the output projection, k kept inputs, d residual width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.numerics.moments import Moments
from secateur.numerics.ridge import NormalEquations, least_squares

ROUNDING = 1e-6
"""Share of the target's energy below which an error is rounding."""


class OutputFit(NamedTuple):
    """New weights of an output projection, and their error."""

    weight_kd: Tensor
    """Weights of the kept inputs, in error units."""
    bias_d: Tensor | None
    """New bias; None if the bias stays as it is."""
    error: float = math.nan
    """||XW - T||^2, without the penalty; NaN if nothing was fitted."""


def fit_output_projection(moments: Moments, normal: NormalEquations, keep: Tensor) -> OutputFit:
    """Return the best weights of the kept inputs, with an intercept if the moments are centred."""
    weight, error = least_squares(normal, keep)
    return OutputFit(weight, intercept(moments, weight, keep) if moments.centre else None, error)


def intercept(moments: Moments, weight_kd: Tensor, keep: Tensor) -> Tensor:
    """Return the bias (d) that makes the mean output equal to the mean target."""
    return (moments.mean_o - moments.mean_a[keep] @ weight_kd.double()).float()


def compensation(moments: Moments, weight_ad: Tensor, keep: Tensor, bias_d: Tensor | None) -> Tensor:
    """Return the bias (d) with which the kept inputs give the mean output of all inputs.

    The means come from the pruned stream, which the module will read when the model runs. FLAP itself takes them from
    the dense model.
    """
    removed = torch.ones(len(weight_ad), dtype=torch.bool, device=weight_ad.device)
    removed[keep] = False
    shift = moments.mean_a[removed] @ weight_ad[removed].double()
    return (shift if bias_d is None else bias_d.double() + shift).float()
