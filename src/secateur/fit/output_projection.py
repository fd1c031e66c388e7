"""Fits of an output projection from statistics alone: least squares, its bias, and bias compensation."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.numerics.moments import Moments
from secateur.numerics.ridge import NormalEquations, least_squares

ROUNDING = 1e-6
"""Errors below this share of a target's energy are none."""


class OutputFit(NamedTuple):
    """What least squares found for a level-2 layer."""

    weight_ko: Tensor
    """Of the kept inputs, in residual units."""
    bias: Tensor | None
    error: float
    """||XW - T||^2, the penalty left out."""
    old_error: float = math.nan
    """The same with the old weights, where it was asked for."""


def fit_output_projection(moments: Moments, normal: NormalEquations, keep: Tensor) -> OutputFit:
    """Best level-2 weights of the kept inputs, and the intercept (o) if the moments are centred."""
    weight, error = least_squares(normal, keep)
    return OutputFit(weight, intercept(moments, weight, keep) if moments.centre else None, error)


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
