"""What one module's level 2 is fitted to, batch by batch: a target, the scale of its inputs, and what tokens count.

The target is error-aware: the dense stream after the module minus what the pruned stream holds without it, so that
each module also repairs what those before it broke. Sequential, parallel and fused blocks need no cases: "without it"
is the block's own forward with the module's output replaced by zero. In a parallel block the attention is fitted first,
to the whole error so far; the feed-forward then sees what the attention left. A recovery may aim at the module's own
dense output instead, and behind a norm each output takes over a share of the error so far
(`secateur.model.post_norm`).

Shapes: n tokens, d residual width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.fit.block import BlockState
from secateur.fit.output_projection import ROUNDING
from secateur.model.arena import Activations
from secateur.model.facts import multiplier_of
from secateur.model.post_norm import PostNorm
from secateur.model.rows import Batch
from secateur.model.structure import PrunableModule


class BatchTarget(NamedTuple):
    """One batch's side of the regression of level 2."""

    target: Tensor
    """What level 2 alone shall give, without a bias that stays: n x d."""
    scale: Tensor | None
    """Of the rows of its input: n x 1; None where a norm does not ask for one."""
    counts: Tensor | None
    """What single tokens count: n; None where all count alike."""

    def scaled(self, rows: Tensor) -> Tensor:
        """Rows of the level-2 input as they are regressed on."""
        return rows if self.scale is None else rows * self.scale


class ModuleTarget:
    """What one module's level 2 is to give in the pruned stream."""

    def __init__(self, state: BlockState, module: PrunableModule, pruned: Activations):
        self.state, self.module, self.pruned = state, module, pruned
        self.norm = PostNorm(state.stream, state.index, state.layer, module)
        recovery = state.method.recovery
        # Where the residual stream itself is normalised, the error so far cannot be repaired.
        additive = state.stream.family.keeps_residual(state.stream.checkpoint.config)
        # Nor where another norm weighs the module's output against what stands beside it.
        self.repairs = additive and module.outer_norm is None and not recovery.fits_own_output
        """Whether it aims at the error so far as well."""
        self.multiplier = multiplier_of(state.stream.checkpoint.config, state.layer)
        """What the module's output is multiplied by on its way to the residual stream."""
        biased = module.bias is not None or recovery.biases == "added"
        self.fits_bias = recovery.biases != "kept" and module.may_gain_bias and biased
        """Whether level 2's bias is part of the fit; a stored one stays as it is otherwise."""
        # What repairs nothing sees all tokens alike, as the formulas of criteria and of FLAP's bias have it.
        self._cauchy_scale = recovery.cauchy_scale
        if self.norm.norm is not None and self.repairs:
            self._share_repairs()

    def of(self, at: Batch) -> BatchTarget:
        """The target of a batch, and what goes with it."""
        z = self._dense(at)
        target = self._target(z, at).reshape(-1, z.shape[-1])
        scale = self.norm.inverse_rms(z)
        scale = None if scale is None else scale.reshape(-1, 1)
        if self.module.bias is not None and not self.fits_bias:
            stays = self.norm.scale(self.state.tensors[self.module.bias])
            target = target - (stays if scale is None else stays * scale)
        return BatchTarget(target, scale, self._counts(target, z))

    def _dense(self, at: Batch) -> Tensor:
        """The module's level-2 output in the dense model."""
        return self.state.output[self.module.kind][at].to(self.state.stream.device)

    def _target(self, z: Tensor, at: Batch) -> Tensor:
        """What the module should add to the residual stream, in the units in which errors count."""
        if not self.repairs:
            return self.norm.own(z)
        missing = self._missing(at)
        if self.norm.norm is None:
            return missing
        return self.norm.own(z) + self.norm.read(self.norm.share_o * (missing - self.norm.after(z)))

    def _missing(self, at: Batch) -> Tensor:
        """What the pruned stream without the module lacks of the dense stream behind it."""
        state, module = self.state, self.module
        without = state.done(module, at) | {module: None}
        if module is state.block.attention:
            without[state.block.feed_forward] = None
        found = state.stream.residual(state.run(self.pruned, at, replay=without, modules=True))
        lacking = state.goal[module.kind][at].to(state.stream.device) - found
        return lacking if self.multiplier == 1 else lacking / self.multiplier

    def _share_repairs(self) -> None:
        """Settle what each output behind a norm takes over of the error so far."""
        stream = self.state.stream
        own, inherited = torch.zeros(2, stream.width, dtype=torch.float64, device=stream.device)
        for at in self.state.rows.batches():
            after = self.norm.after(self._dense(at))
            error = self._missing(at) - after
            for total, part in ((own, after), (inherited, error)):
                total += at.weight * part.square().flatten(0, -2).sum(0)
        stream.processes.all_reduce(own, inherited)
        self.norm.take_over(own, inherited)

    def _counts(self, target: Tensor, z: Tensor) -> Tensor | None:
        """What tokens count: less where the stream already errs by much more than is usual; None behind a norm.

        Errors have heavy tails. A few tokens whose massive activation was missed carry an error that no later module
        can mend; in plain least squares they are most of what every one of those modules is fitted to.
        """
        if not self.repairs or self.module.post_norm is not None or self._cauchy_scale == math.inf:
            return None
        inherited = (target - z.reshape(target.shape)).square().sum(1)
        # Where nothing is inherited, what is left is rounding.
        least = (ROUNDING * target.square().sum(1).mean()).clamp_min(torch.finfo(torch.float32).tiny)
        return 1 / (1 + inherited / (self._cauchy_scale * inherited.median()).clamp_min(least))
