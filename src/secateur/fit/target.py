"""Target of one module's output projection, batch by batch, with the scale of its rows and the token weights.

    t = (dense stream after the module) - (pruned stream without the module)

The target is error-aware: each module also repairs the error of the modules before it. The pruned stream without the
module is the block's own forward pass with the module's output replaced by zero, whether the block is sequential or
parallel. In a parallel block the attention is fitted first, to the whole error, and the feed-forward to what is left.

Exceptions: a recovery may ask for the module's own dense output instead. If a norm follows the output projection, each
output takes over a share of the error (`secateur.model.post_norm`).

Error units are the units in which errors are measured: the units of the residual stream. If a norm follows the output
projection, they are the units in which later layers read the residual stream after their own norms.

Shapes: n tokens of a batch, a inputs of the output projection, d residual width; b x t x d for stored activations.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.checkpoints.facts import multiplier_of
from secateur.fit.block_state import BlockState
from secateur.fit.output_projection import ROUNDING
from secateur.model.arena import Activations
from secateur.model.post_norm import PostNorm
from secateur.model.rows import Batch
from secateur.model.stream import FilledModule
from secateur.model.structure import PrunableModule


class BatchTarget(NamedTuple):
    """Targets of one batch, with what its rows are multiplied by."""

    target_nd: Tensor
    """Target of the output projection, in error units. If the bias is not fitted, it is subtracted."""
    scale_n1: Tensor | None
    """Factor on the rows X; None unless a norm follows the output projection."""
    weights_n: Tensor | None
    """Token weights; None if they are equal."""

    def scaled(self, x_na: Tensor) -> Tensor:
        """Return rows times their scale."""
        return x_na if self.scale_n1 is None else x_na * self.scale_n1


class ModuleTarget:
    """Target of one module in the pruned stream.

    Attributes:
        state: The block.
        module: The module.
        pruned: The pruned stream before the block.
        norm: Norm between the output projection and the residual stream; neutral if there is none.
        is_error_aware: Whether the target contains the error of the modules before this one.
        multiplier: Factor on the module's output on its way to the residual stream.
        fits_bias: Whether the bias of the output projection is fitted; otherwise a stored bias stays.
    """

    def __init__(self, state: BlockState, module: PrunableModule, pruned: Activations):
        self.state, self.module, self.pruned = state, module, pruned
        self.norm = PostNorm(FilledModule(state.stream, state.index, state.layer, module))
        config, recovery = state.stream.checkpoint.config, state.method.recovery
        # The error cannot be repaired if the residual stream itself is normalised, or if a second norm scales the
        # module's output together with another module's.
        additive = not state.stream.family.changes_residual and module.outer_norm is None
        self.is_error_aware = additive and not recovery.fits_own_output
        self.multiplier = multiplier_of(config, state.layer)
        has_bias = module.bias is not None or recovery.biases == "added"
        self.fits_bias = recovery.biases != "kept" and module.may_gain_bias and has_bias
        self._cauchy_scale = recovery.cauchy_scale
        if self.norm.norm is not None and self.is_error_aware:
            self._set_repaired_shares()

    def of(self, at: Batch) -> BatchTarget:
        """Return the target of a batch."""
        z_btd = self._dense_output(at)
        target = self._target(z_btd, at).reshape(-1, z_btd.shape[-1])
        scale = self.norm.inverse_rms(z_btd)
        scale = None if scale is None else scale.reshape(-1, 1)
        weights = self._weights(target, z_btd)
        if self.module.bias is not None and not self.fits_bias:
            bias = self.norm.scale(self.state.tensors[self.module.bias])
            target = target - (bias if scale is None else bias * scale)
        return BatchTarget(target, scale, weights)

    def _dense_output(self, at: Batch) -> Tensor:
        """Return the output of the dense output projection (b x t x d)."""
        return self.state.outputs[self.module.kind][at].to(self.state.stream.device)

    def _target(self, z_btd: Tensor, at: Batch) -> Tensor:
        """Return what the module should add to the residual stream, in error units (b x t x d)."""
        if not self.is_error_aware:
            return self.norm.output(z_btd)
        missing = self._missing(at)
        if self.norm.norm is None:
            return missing
        return self.norm.output(z_btd) + self.norm.scale_stream(self.norm.share_o * (missing - self.norm.after(z_btd)))

    def _missing(self, at: Batch) -> Tensor:
        """Return the dense stream after the module minus the pruned stream without the module (b x t x d)."""
        state, module = self.state, self.module
        modules = state.block.modules
        replay = state.outputs_before(module, at) | dict.fromkeys(modules[modules.index(module) :])
        without = state.stream.residual(state.run(self.pruned, at, replay=replay, modules_only=True))
        missing = state.dense_residual[module.kind][at].to(state.stream.device) - without
        return missing if self.multiplier == 1 else missing / self.multiplier

    def _set_repaired_shares(self) -> None:
        """Set the share of the error that each output before a norm takes over, from the energies of the two."""
        stream = self.state.stream
        energies = [torch.zeros(0, 2, stream.width, dtype=torch.float64, device=stream.device)]
        for at in self.state.rows.batches():
            output = self.norm.after(self._dense_output(at))
            both = torch.stack([output, self._missing(at) - output]).square().flatten(1, -2).sum(1, dtype=torch.float64)
            energies.append(at.weight * both[None])
        self.norm.set_repair_shares(*stream.processes.gather(torch.cat(energies)).sum(0))

    def _weights(self, target_nd: Tensor, z_btd: Tensor) -> Tensor | None:
        """Return Cauchy weights of the tokens, 1 / (1 + e_n / (c median(e))), with e_n the inherited squared error.

        Both the target and the dense output contain the bias. The median is over the tokens of the batch.

        The inherited error has heavy tails: a few tokens whose massive activation was missed carry errors that no later
        module can repair, and in ordinary least squares these tokens would dominate every later fit. Weights are equal
        if the target inherits no error, or if a norm follows the output projection.
        """
        if not self.is_error_aware or self.module.post_norm is not None or self._cauchy_scale == math.inf:
            return None
        inherited_n = (target_nd - z_btd.reshape(target_nd.shape)).square().sum(1)
        # If nothing is inherited, only rounding is left.
        rounding = (ROUNDING * target_nd.square().sum(1).mean()).clamp_min(torch.finfo(torch.float32).tiny)
        return 1 / (1 + inherited_n / (self._cauchy_scale * inherited_n.median()).clamp_min(rounding))
