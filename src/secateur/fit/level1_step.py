"""Level 1 of a feed-forward module fitted along: the step of `fit/level1.py` on the tokens of the pruned stream.

Shapes: n tokens, d residual width, k kept channels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from secateur.base.device import fast_dtype
from secateur.fit.inputs import Inputs
from secateur.fit.level1 import Part, Tangent, factors, outputs
from secateur.fit.recovery import Fit
from secateur.fit.target import ModuleTarget
from secateur.model.facts import activation_of


def level1_step(target: ModuleTarget, kept: Tensor, inputs: Inputs, fit: Fit) -> dict[str, Tensor]:
    """New level-1 weights, from one Gauss-Newton step at a fit of level 2."""
    module, state, stream = target.module, target.state, target.state.stream
    device, width, recovery = stream.device, stream.width, state.method.recovery
    activation, dtype = activation_of(stream.checkpoint.config, state.layer), fast_dtype(device)
    batches = [at for at in state.rows.batches() if at.weight]
    source = state.arena.empty(state.rows, width, dtype)
    stored = [state.arena.empty(state.rows, len(kept), dtype) for _ in module.scored]
    tokens = stream.team.total(sum(state.rows.ids(at).numel() for at in batches))
    tangent = Tangent(fit.weight_ko, len(stored), width, int(tokens), stream.team)
    outputs_of = inputs.times(fit.weight_ko, kept)
    for at in batches:
        s = state.inputs_of(module, target.pruned, at, module.source)[module.source].reshape(-1, width)
        wanted = target.of(at)
        counts = torch.ones(len(s), device=device) if wanted.counts is None else wanted.counts.sqrt()
        root = at.weight**0.5 * counts[:, None]
        scaled = wanted.scaled(root)
        with stream.rounded():
            given, pre = outputs_of(at).reshape(len(s), -1), outputs(module, state.tensors, s, kept)
        goal = wanted.target if fit.bias is None else wanted.target - fit.bias
        error = goal * root - given * scaled
        found = [f * scaled for f in factors(activation, pre)]
        source[at] = s
        for room, factor in zip(stored, found, strict=True):
            room[at] = factor
        with stream.rounded():
            tangent.add(Part(s.to(dtype), [f.to(dtype) for f in found]), error.to(dtype), root)

    def parts() -> Iterator[Part]:
        for at in batches:
            s = source[at].to(device).reshape(-1, width)
            yield Part(s, [room[at].to(device).reshape(len(s), -1) for room in stored])

    changes = tangent.step(parts, recovery.ridge, recovery.level1)
    for room in (source, *stored):
        state.arena.release(room)
    result = {slab.name: state.tensors[slab.name].clone() for slab in module.scored}
    for slab, change in zip(module.scored, changes, strict=True):
        result[slab.name].index_add_(slab.axis, slab.offset + kept, change.movedim(0, slab.axis))
    return result
