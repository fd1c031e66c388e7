"""What a module's refit aims at, and the scale on which its error counts.

The target is error-aware: the dense stream after the module minus what the pruned stream holds without it, so
that each module also repairs what those before it broke. Sequential, parallel and fused blocks need no cases:
"without it" is the block's own forward with the module's output replaced by zero. In a parallel block the attention
is fitted first, to the whole error so far; the feed-forward then sees what the attention left.

A norm between level 2 and the stream, y = w * z / r, is carried back through: with r taken from the dense pass,
rows of the level-2 input are divided by r and its weight's columns multiplied by w, after which the same least
squares applies, with errors measured in the residual stream. The target is then the module's own dense output alone,
since the norm couples its outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.structure import Depth2


class PostNorm:
    """The norm after a module's level 2, as a gain per output and a divisor per row; neutral if there is none."""

    def __init__(self, layer: nn.Module, module: Depth2, width: int, device: torch.device):
        self.norm = layer.get_submodule(module.post_norm) if module.post_norm else None
        self.gain_o = torch.ones(width, device=device)
        if self.norm is not None:
            # Ones have unit root mean square: the norm then returns its gain, whichever way it stores it.
            self.gain_o = self.norm(self.gain_o)

    def inverse_rms(self, z_bto: Tensor) -> Tensor | None:
        """1 / r of each row (b, t, 1) of level-2 outputs; None without a norm."""
        if self.norm is None:
            return None
        reference = self.gain_o * z_bto
        energy = reference.square().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return (self.norm(z_bto) * reference).sum(-1, keepdim=True) / energy

    def scale(self, weight_ao: Tensor) -> Tensor:
        """Level-2 weight into residual units."""
        return weight_ao * self.gain_o if self.norm is not None else weight_ao

    def unscale(self, weight_ao: Tensor) -> Tensor:
        """Back from residual units; outputs that the norm mutes get zero weights."""
        if self.norm is None:
            return weight_ao
        muted = self.gain_o.abs() < 1e-6
        return torch.where(muted, 0.0, weight_ao / torch.where(muted, 1.0, self.gain_o))
