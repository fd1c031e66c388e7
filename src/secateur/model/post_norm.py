"""Norm between the output projection and the residual stream, in a form that keeps the fit one linear least squares.

The module adds y = w * z / r to the residual stream: z is the output of the output projection, r its root mean square
and w the gain. With r from the dense model, inputs of the projection are divided by r, and columns of its weight are
multiplied by w. Two more things differ from modules without such a norm:

- In such models, a few entries of the stream are huge, and the norms before later modules have small gains for them.
  In a plain sum of errors, which decides the choice of units, these entries would outweigh all others. So errors are
  scaled as later layers read them: by the root mean square of the gains of the later norms.
- The norm gives all outputs of a module one scale. In the huge entries the error so far is many times the module's own
  output, and a module that repaired this error would lose the scale of its other outputs. So each output repairs
  only the share of the error so far that is in proportion to the output's own energy.

Shapes: b rows, t positions, a inputs of the output projection, o its outputs.
"""

import torch
from torch import Tensor

from secateur.model.stream import FilledModule

MUTED = 1e-2
"""Smallest scale of an output, as a share of the median scale."""
REPAIR = 0.1
"""Constant of the repaired share: k / (k + 1 / REPAIR) for an output with k times the energy of the error so far."""


class PostNorm:
    """Norm after the output projection of a module: a factor per output and a divisor per row; neutral without a
    norm."""

    def __init__(self, filled: FilledModule):
        """Read the module's norm, and the gains of the later norms of the model."""
        stream, layer, module = filled.stream, filled.layer, filled.module
        self.norm = layer.get_submodule(module.post_norm) if module.post_norm else None
        self.reading_scale_o: Tensor | None = None
        """Root mean square of later norms' gains for each entry of the stream; None for equal gains."""
        self.share_o = torch.zeros(stream.width, device=stream.device)
        """Share of the error so far that each output repairs; see `set_repair_shares`."""
        self._gain_o = self._size_o = torch.ones(stream.width, device=stream.device)
        if self.norm is None:
            return
        # Ones have unit root mean square: the norm then returns its gain, whichever way it stores it.
        self._gain_o = self._size_o = self.norm(self._gain_o)
        gains = stream.reading_gains
        if gains is not None:
            earlier = sum(len(block.modules) for block in stream.blocks[: filled.index])
            place = earlier + stream.blocks[filled.index].modules.index(module)
            self.reading_scale_o = gains[place + 1 :].square().mean(0).sqrt()
            self._size_o = self._gain_o * self.reading_scale_o
        if module.outer_norm is not None:
            # Only its gains matter: its divisor hardly changes when units are removed.
            self._size_o = self._size_o * layer.get_submodule(module.outer_norm)(torch.ones_like(self._gain_o))
        least = MUTED * self._size_o.abs().median()
        self._size_o = torch.where(self._size_o.abs() < least, least, self._size_o)

    def inverse_rms(self, z_bto: Tensor) -> Tensor | None:
        """Return 1 / r for each row of outputs (b x t x 1); None without a norm."""
        if self.norm is None:
            return None
        reference = self._gain_o * z_bto
        energy = reference.square().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return (self.norm(z_bto) * reference).sum(-1, keepdim=True) / energy

    def scale(self, weight_ao: Tensor) -> Tensor:
        """Return a weight or bias of the output projection in the scale in which errors are measured."""
        return weight_ao * self._size_o if self.norm is not None else weight_ao

    def unscale(self, weight_ao: Tensor) -> Tensor:
        """Return a weight or bias in its stored scale: the inverse of `scale`."""
        return weight_ao / self._size_o if self.norm is not None else weight_ao

    def output(self, z_bto: Tensor) -> Tensor:
        """Return the module's output, from the output of its projection, in the scale in which errors are measured."""
        inverse = self.inverse_rms(z_bto)
        return z_bto if inverse is None else self.scale(z_bto * inverse)

    def scale_stream(self, stream_bto: Tensor) -> Tensor:
        """Return vectors of the residual stream in the scale in which later layers read them."""
        return stream_bto if self.reading_scale_o is None else stream_bto * self.reading_scale_o

    def after(self, z_bto: Tensor) -> Tensor:
        """Return the vectors that the norm adds to the residual stream."""
        return z_bto if self.norm is None else self.norm(z_bto)

    def set_repair_shares(self, own_o: Tensor, missing_o: Tensor) -> None:
        """Set the repaired shares, from the energy of each output and of the error so far in the same entry."""
        able = REPAIR * own_o
        self.share_o = (able / (able + missing_o).clamp_min(torch.finfo(torch.float64).tiny)).float()
