"""A norm between level 2 and the residual stream, carried back through, so that level 2 stays one least squares.

Of y = w * z / r, r is taken from the dense pass: rows of the level-2 input are divided by it, and columns of the weight
multiplied by w. Two things differ from modules without such a norm:

- Models of this kind let a few entries of the stream grow huge, and the norms in front of later modules have small
  gains for them. Which units go is decided by the sum of all outputs' errors, which those few would be most of. So
  errors are counted as later layers read them: times the root mean square of the gains of the norms still to come.
- The norm gives all outputs of a module one scale. In those few entries the error so far is many times what a
  module ever writes, and one that set out to repair it would take its scale from all other outputs. So each output
  takes over the share of the error so far that its own energy can carry.
"""

import torch
from torch import Tensor, nn

from secateur.model.axes import ATTENTION
from secateur.model.stream import BlockStream
from secateur.model.structure import PrunableModule

MUTED = 1e-2
"""Outputs whose scale is below this part of the median one count as if theirs were as large."""
REPAIR = 0.1
"""An output whose own energy is k times that of the error so far takes over k / (k + 1 / REPAIR) of it."""


class PostNorm:
    """The norm after a module's level 2, as a factor per output and a divisor per row; neutral if there is none."""

    def __init__(self, stream: BlockStream, index: int, layer: nn.Module, module: PrunableModule):
        """Read the norm off a filled block, and off the model how strongly later layers read the stream."""
        self.norm = layer.get_submodule(module.post_norm) if module.post_norm else None
        self.read_o: Tensor | None = None
        """How strongly later layers read each entry of the stream after the module; None for all alike."""
        self.share_o = torch.zeros(stream.width, device=stream.device)
        """How much of the error so far each output takes over; see `take_over`."""
        self._gain_o = self._size_o = torch.ones(stream.width, device=stream.device)
        if self.norm is None:
            return
        # Ones have unit root mean square: the norm then returns its gain, whichever way it stores it.
        self._gain_o = self._size_o = self.norm(self._gain_o)
        gains = stream.reading_gains
        if gains is not None:
            self.read_o = gains[2 * index + 1 + (module.role != ATTENTION) :].square().mean(0).sqrt()
            self._size_o = self._gain_o * self.read_o
        if module.outer_norm is not None:
            # Its gains count as well; its scale is much the same whatever goes.
            self._size_o = self._size_o * layer.get_submodule(module.outer_norm)(torch.ones_like(self._gain_o))
        least = MUTED * self._size_o.abs().median()
        self._size_o = torch.where(self._size_o.abs() < least, least, self._size_o)

    def inverse_rms(self, z_bto: Tensor) -> Tensor | None:
        """1 / r of each row (b, t, 1) of level-2 outputs; None without a norm."""
        if self.norm is None:
            return None
        reference = self._gain_o * z_bto
        energy = reference.square().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return (self.norm(z_bto) * reference).sum(-1, keepdim=True) / energy

    def scale(self, weight_ao: Tensor) -> Tensor:
        """A level-2 weight (or bias) into the units in which errors count."""
        return weight_ao * self._size_o if self.norm is not None else weight_ao

    def unscale(self, weight_ao: Tensor) -> Tensor:
        """Back from these units."""
        return weight_ao / self._size_o if self.norm is not None else weight_ao

    def own(self, z_bto: Tensor) -> Tensor:
        """The module's own output, of what its level 2 yields, in the units in which errors count."""
        inverse = self.inverse_rms(z_bto)
        return z_bto if inverse is None else self.scale(z_bto * inverse)

    def read(self, stream_bto: Tensor) -> Tensor:
        """Vectors of the residual stream as later layers read them."""
        return stream_bto if self.read_o is None else stream_bto * self.read_o

    def after(self, z_bto: Tensor) -> Tensor:
        """What the norm adds to the residual stream."""
        return z_bto if self.norm is None else self.norm(z_bto)

    def take_over(self, own_o: Tensor, missing_o: Tensor) -> None:
        """Settle the shares, from the energies of each output and of the error so far in its place."""
        able = REPAIR * own_o
        self.share_o = (able / (able + missing_o).clamp_min(torch.finfo(torch.float64).tiny)).float()
