"""One block while it is pruned: what its modules aim at, which of their units stay, and how these are refitted.

Its dense forward gives the residual stream after either module; then each module of the pruned stream in turn is run up
to its level-2 input, whose moments decide what stays and how it is refitted. The level-2 inputs are kept for the
length of a block, so that outputs after the refit cost one product.

Shapes: n tokens, a level-2 input entries, k of them kept, d residual width; rows x t x d for stored activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.activations import Activations, Arena, Batch, Rows
from secateur.choice import parse_choice
from secateur.criteria import NEEDS_INPUTS, Statistics, pattern_units, removal_order, survivors
from secateur.device import fast_dtype
from secateur.errors import SecateurError
from secateur.families import activation_of
from secateur.level1 import Part, Tangent, factors, outputs
from secateur.moments import Moments
from secateur.recovery import Fit, Recovery, compensation, fit_level1, fit_level2, intercept
from secateur.solve import residual
from secateur.steps.gradients import UnitScores
from secateur.steps.survey import module_seed
from secateur.stream import BlockStream
from secateur.structure import KINDS, Depth2, Kind, Pattern, Width
from secateur.surgery import assign, inner_entries, inner_weight, stored_weight
from secateur.targets import PostNorm

ROUNDING = 1e-6
"""Errors below this share of a target's energy are none."""


@dataclass(frozen=True)
class ModuleReport:
    """What became of one module."""

    kind: Kind
    kept: int
    units: int
    error: float
    """||XW - T||^2 per token, without the penalty; in the residual stream's units, or as later layers read it."""
    relative: float
    """The same over the energy of the dense residual stream after the module."""


@dataclass(frozen=True)
class Method:
    """How units are chosen and what is done about the loss."""

    criterion: str = "surgeon"
    recovery: Recovery = field(default_factory=Recovery)
    seed: int = 0
    scores: UnitScores | None = None
    """Of a criterion that needs gradients; by default `refit` takes them itself."""
    similar: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Heads of each block that resemble another one and leave first."""

    def criterion_of(self, kind: Kind) -> str:
        """The criterion for one kind of unit."""
        return parse_choice(self.criterion).of(kind)


class BlockWork:
    """One block's weights, goals and outputs, while it is being pruned."""

    def __init__(
        self,
        stream: BlockStream,
        index: int,
        layer: nn.Module,
        method: Method,
        dtype: torch.dtype,
        rows: Rows,
        arena: Arena,
    ):
        self.stream, self.index, self.layer, self.method = stream, index, layer, method
        self.dtype, self.rows, self.arena = dtype, rows, arena
        self.block = stream.blocks[index]
        self.tensors: dict[str, Tensor] = dict(layer.named_parameters())
        self.changed: dict[str, Tensor] = {}
        """Tensors with new values, full width, float32."""
        self.goal: dict[Kind, Activations] = {}
        """Dense residual stream after each module."""
        self.output: dict[Kind, Activations] = {}
        """Level-2 outputs: the dense model's at first, the pruned model's once a module is done."""
        self.input: dict[Kind, Activations] = {}
        """Dense module inputs, for the refit of level 1."""
        # Where the residual stream itself is normalised (OPT-350m), the error so far cannot be repaired.
        self.additive = getattr(stream.checkpoint.config, "do_layer_norm_before", True)

    def _run(self, hidden: Activations, at: Batch, **how: Any) -> Tensor:
        return self.stream.run_through(self.index, self.layer, hidden[at], at.group, **how)

    def run_dense(self, dense: Activations) -> None:
        """Advance the dense stream in place, keeping what the modules are fitted to."""
        attention, feed_forward = self.block.attention, self.block.feed_forward
        for kind in KINDS:
            self.goal[kind] = self.arena.empty(self.rows, self.stream.width)
            self.output[kind] = self.arena.empty(self.rows, self.stream.width)
            if self.method.recovery.method == "paper":
                self.input[kind] = self.arena.empty(self.rows, self.stream.width)
        for at in self.rows.batches():
            seen: dict[str, tuple[Tensor, Tensor]] = {}
            watch = {m.sink: _keep_both(seen, m.sink) for m in (attention, feed_forward)}
            if self.input:
                watch |= {m.source: _keep_both(seen, m.source) for m in (attention, feed_forward)}
            after = self._run(dense, at, watch=watch)
            for module in (attention, feed_forward):
                self.output[module.kind][at] = seen[module.sink][1]
                if self.input:
                    self.input[module.kind][at] = seen[module.source][0]
            replay = {attention: self.output["heads"][at], feed_forward: None}
            self.goal["heads"][at] = self._run(dense, at, replay=replay)
            self.goal["channels"][at] = after
            dense[at] = after

    def prune_module(
        self, kind: Kind, pruned: Activations, width: Width, given: tuple[int, ...] | None
    ) -> tuple[tuple[int, ...], ModuleReport]:
        """Choose the module's units unless they are given, refit it, and put the pruned stream's output in place."""
        module, recovery = self.block.module(kind), self.method.recovery
        norm = PostNorm(self.stream, self.index, self.layer, module)
        self._share_repairs(module, norm, pruned)
        if recovery.method == "paper" and recovery.before:
            self._refit_level1(module, pruned)
        old = norm.scale(inner_weight(module, self.tensors))
        only = None
        if given and recovery.method == "refit" and not recovery.before:
            # Inputs that go would not be looked at.
            only = inner_entries(module, given).to(old.device)
        x, moments, scored, inputs = self._collect(module, norm, pruned, only)
        stats = self._statistics(module, old if only is None else old[only], moments, inputs)
        choice = stats if scored is moments else self._statistics(module, old, scored, inputs)
        weight, bias = old, None
        if recovery.before:
            everything = torch.arange(old.shape[0], device=old.device)
            weight, bias, _ = fit_level2(moments, stats.normal, everything)
            choice.weight_ao, choice.pull_ao = weight, old
            choice.tensors = self.tensors | {module.level2.name: stored_weight(module, norm.unscale(weight))}
        keep = self._choose(choice, width) if given is None else given
        # Its Gram matrix is as large as the one that is solved next.
        del choice, scored
        kept = inner_entries(module, keep).to(old.device)
        if recovery.method == "paper" and not recovery.before:
            self._refit_level1(module, pruned)
            self.arena.release(x)
            x, moments, _, _ = self._collect(module, norm, pruned)
            stats = self._statistics(module, old, moments, None)
        # Where the kept entries are among those collected.
        stay = kept if only is None else torch.arange(len(kept), device=kept.device)
        if recovery.after:
            fit = fit_level2(moments, stats.normal, stay)
            # An error that is rounding alone asks for nothing.
            if recovery.fits_level1 and module.scored and len(kept) and fit.error > ROUNDING * stats.normal.energy:
                x, fit = self._fit_both(module, norm, pruned, kept, x, stay, fit)
                stay = torch.arange(len(kept), device=kept.device)
            fitted, bias, error = fit
        else:
            fitted = weight[kept]
            error = residual(stats.normal, fitted, kept)
        if recovery.method == "bias" and self._fits_bias(module):
            bias = compensation(moments, old, kept, self.tensors.get(module.bias or ""))
            # Centred moments leave the mean out of the error.
            error += moments.count * float((intercept(moments, fitted, kept) - bias).double().square().sum())
        self._store(module, norm, old, fitted, bias, kept)
        self._advance(module, x, kept, stay)
        self.arena.release(x)
        energy = self.goal[kind].energy(self.rows, norm.read_o)
        return keep, ModuleReport(kind, len(keep), module.units, error / moments.count, error / energy)

    def _statistics(self, module: Depth2, old: Tensor, moments: Moments, inputs: Moments | None) -> Statistics:
        return Statistics(
            module=module,
            tensors=self.tensors,
            weight_ao=old,
            moments=moments,
            inputs=inputs,
            ridge=self.method.recovery.ridge,
            own_target=False,
            seed=module_seed(self.method.seed, self.index, module.kind),
            scores=(self.method.scores or {}).get((self.index, module.kind)),
            similar=frozenset(self.method.similar.get(self.index, ()) if module.kind == "heads" else ()),
        )

    def _collect(
        self, module: Depth2, norm: PostNorm, pruned: Activations, kept: Tensor | None = None
    ) -> tuple[Activations, Moments, Moments, Moments | None]:
        """Run the pruned stream up to the module's level 2: its input, stored, and the moments with the target.

        The moments to fit come first, then those to choose units by, which are the same ones unless the rows say
        otherwise, and for the same purpose those of the module's input. With `kept`, units have been chosen: all is
        about these inputs.
        """
        entries = module.units * module.size if kept is None else len(kept)
        x = self.arena.empty(self.rows, entries, self.stream.products)
        device = self.stream.device
        moments = Moments(entries, self.stream.width, centre=self._fits_bias(module), device=device)
        scored, inputs = moments, None
        if self.rows.scores is not None and kept is None:
            scored = Moments(entries, self.stream.width, centre=moments.centre, device=device)
        if kept is None and module.kind == "channels" and self.method.criterion_of(module.kind) in NEEDS_INPUTS:
            inputs = Moments(self.stream.width, device=device)
        for at in self.rows.batches():
            seen: dict[str, Tensor] = {}
            watch = {module.sink: _keep(seen, "sink")}
            if inputs is not None:
                watch[module.source] = _keep(seen, "source")
            self.stream.run(
                self.index,
                self.layer,
                pruned[at],
                at.group,
                replay=self._done(module, at),
                watch=watch,
                until=module.sink,
            )
            target, scale = self._regressed(module, norm, pruned, at)
            rows = seen["sink"].flatten(0, -2)
            if kept is not None:
                rows = rows[:, kept]
            x[at] = rows
            if scale is not None:
                rows = rows * scale
            # One entry where both are the same.
            for sums, weight in {scored: at.score, moments: at.weight}.items():
                if weight:
                    sums.update(rows, target, weight, self._weights(module, target, at))
            if at.score and inputs is not None:
                inputs.update(seen["source"].reshape(-1, self.stream.width), weight=at.score)
        if not (moments.finite() and scored.finite()):
            what = {"heads": "attention", "channels": "feed-forward"}[module.kind]
            raise SecateurError(f"block {self.index}: the {what} module gives NaN or infinite activations")
        return x, moments, scored, inputs

    @property
    def _repairs(self) -> bool:
        """Whether modules aim at the error so far as well."""
        return self.additive and self.method.recovery.method != "paper"

    def _missing(self, module: Depth2, pruned: Activations, at: Batch) -> Tensor:
        """What the pruned stream without the module lacks of the dense stream behind it."""
        without = self._done(module, at) | {module: None}
        if module is self.block.attention:
            without[self.block.feed_forward] = None
        return self.goal[module.kind][at].to(self.stream.device) - self._run(pruned, at, replay=without)

    def _share_repairs(self, module: Depth2, norm: PostNorm, pruned: Activations) -> None:
        """Settle what each output behind a norm takes over of the error so far."""
        if norm.norm is None or not self._repairs:
            return
        own, inherited = torch.zeros(2, self.stream.width, dtype=torch.float64, device=self.stream.device)
        for at in self.rows.batches():
            after = norm.after(self.output[module.kind][at].to(self.stream.device))
            error = self._missing(module, pruned, at) - after
            for total, part in ((own, after), (inherited, error)):
                total += at.weight * part.square().flatten(0, -2).sum(0)
        norm.take_over(own, inherited)

    def _target(self, module: Depth2, norm: PostNorm, pruned: Activations, at: Batch) -> Tensor:
        """What the module should add to the residual stream."""
        z = self.output[module.kind][at].to(self.stream.device)
        if not self._repairs:
            return norm.own(z)
        missing = self._missing(module, pruned, at)
        if norm.norm is None:
            return missing
        return norm.own(z) + norm.read(norm.share_o * (missing - norm.after(z)))

    def _regressed(
        self, module: Depth2, norm: PostNorm, pruned: Activations, at: Batch
    ) -> tuple[Tensor, Tensor | None]:
        """What level 2 alone shall give (n x d), without a bias that stays; and the scale of its input rows (n x 1)."""
        target = self._target(module, norm, pruned, at).reshape(-1, self.stream.width)
        scale = norm.inverse_rms(self.output[module.kind][at].to(self.stream.device))
        scale = None if scale is None else scale.reshape(-1, 1)
        if module.bias is not None and not self._fits_bias(module):
            target = target - norm.scale(self.tensors[module.bias]) * (1 if scale is None else scale)
        return target, scale

    def _source(self, module: Depth2, pruned: Activations, at: Batch) -> Tensor:
        """The module's input in the pruned stream (n x d)."""
        seen: dict[str, Tensor] = {}
        replay, watch = self._done(module, at), {module.source: _keep(seen, "source")}
        self.stream.run(self.index, self.layer, pruned[at], at.group, replay=replay, watch=watch, until=module.source)
        return seen["source"].reshape(-1, self.stream.width)

    def _weights(self, module: Depth2, target: Tensor, at: Batch) -> Tensor | None:
        """What single tokens count (n): less where the stream already errs by much more than is usual.

        Errors have heavy tails. A few tokens whose massive activation was missed carry an error that no later module
        can mend; in plain least squares they are most of what every one of those modules is fitted to.
        """
        usual = self.method.recovery.usual
        if not self._repairs or module.post_norm is not None or usual == math.inf:
            return None
        own = self.output[module.kind][at].to(target.device)
        inherited = (target - own.reshape(target.shape)).square().sum(1)
        # Where nothing is inherited, what is left is rounding.
        least = ROUNDING * target.square().sum(1).mean()
        return 1 / (1 + inherited / (usual * inherited.median()).clamp_min(least))

    def _done(self, module: Depth2, at: Batch) -> dict[Depth2, Tensor | None]:
        """Outputs of the block's modules before this one, in the pruned stream."""
        attention = self.block.attention
        return {} if module is attention else {attention: self.output["heads"][at]}

    def _choose(self, stats: Statistics, width: Width) -> tuple[int, ...]:
        module = stats.module
        pattern: Pattern = "channels"
        if module.kind == "heads":
            pattern = "groups" if width.groups < module.groups else "heads"
        stop = width.along(pattern)
        if stop == 0:
            return ()
        if stop == pattern_units(module, pattern):
            return tuple(range(module.units))
        criterion = self.method.criterion_of(module.kind)
        return survivors(module, pattern, removal_order(criterion, stats, pattern, stop))

    def _refit_level1(self, module: Depth2, pruned: Activations) -> None:
        """Level 1 to the dense level-1 outputs, all rows: each is a regression of its own, whatever is kept."""
        biased = any(slab.name.endswith(".bias") for slab in module.level1)
        width = self.stream.width
        inputs = Moments(width, width, centre=biased, device=self.stream.device)
        for at in self.rows.batches():
            dense = self.input[module.kind][at].to(self.stream.device)
            inputs.update(self._source(module, pruned, at), dense.reshape(-1, width), at.weight)
        self._change(fit_level1(module, self.tensors, inputs, self.method.recovery.ridge))

    def _fit_both(
        self,
        module: Depth2,
        norm: PostNorm,
        pruned: Activations,
        kept: Tensor,
        x: Activations,
        stay: Tensor,
        fit: Fit,
    ) -> tuple[Activations, Fit]:
        """Level 1 of the feed-forward fitted along, then level 2 once more; all as it was where that gains nothing.

        Takes the stored level-2 inputs, the kept ones at `stay`, and the fit of level 2, and returns those that hold
        then, of kept inputs alone.
        """
        before = {slab.name: self.tensors[slab.name] for slab in module.scored}
        self._change(self._level1_step(module, norm, pruned, kept, x, stay, fit))
        old = norm.scale(inner_weight(module, self.tensors))[kept]
        self.arena.release(x)
        x, moments, _, _ = self._collect(module, norm, pruned, kept)
        everything = torch.arange(len(kept), device=kept.device)
        again = fit_level2(moments, self._statistics(module, old, moments, None).normal, everything)
        if again.error < fit.error:
            return x, again
        self._change(before)
        self.arena.release(x)
        return self._collect(module, norm, pruned, kept)[0], fit

    def _level1_step(
        self, module: Depth2, norm: PostNorm, pruned: Activations, kept: Tensor, x: Activations, stay: Tensor, fit: Fit
    ) -> dict[str, Tensor]:
        """New level-1 weights, from one Gauss-Newton step at a fit of level 2."""
        activation, device, width = activation_of(self.stream.checkpoint.config), self.stream.device, self.stream.width
        batches = [at for at in self.rows.batches() if at.weight]
        dtype = fast_dtype(device)
        source = self.arena.empty(self.rows, width, dtype)
        stored = [self.arena.empty(self.rows, len(kept), dtype) for _ in module.scored]
        tangent = Tangent(fit.weight_ko, len(stored), width, sum(self.rows.ids(at).numel() for at in batches))
        for at in batches:
            s = self._source(module, pruned, at)
            target, scale = self._regressed(module, norm, pruned, at)
            counts = self._weights(module, target, at)
            root = at.weight**0.5 * (torch.ones(len(s), device=device) if counts is None else counts.sqrt())[:, None]
            scaled = root if scale is None else root * scale
            given = x[at].to(device, torch.float32).reshape(len(s), -1)[:, stay] @ fit.weight_ko
            residual = (target if fit.bias is None else target - fit.bias) * root - given * scaled
            found = [f * scaled for f in factors(activation, outputs(module, self.tensors, s, kept))]
            source[at] = s
            for room, factor in zip(stored, found, strict=True):
                room[at] = factor
            tangent.add(Part(s.to(dtype), [f.to(dtype) for f in found]), residual.to(dtype), root)

        def parts() -> Iterator[Part]:
            for at in batches:
                s = source[at].to(device).reshape(-1, width)
                yield Part(s, [room[at].to(device).reshape(len(s), -1) for room in stored])

        recovery = self.method.recovery
        changes = tangent.step(parts, recovery.ridge, recovery.level1)
        for room in (source, *stored):
            self.arena.release(room)
        result = {slab.name: self.tensors[slab.name].clone() for slab in module.scored}
        for slab, change in zip(module.scored, changes, strict=True):
            result[slab.name].index_add_(slab.axis, slab.offset + kept, change.movedim(0, slab.axis))
        return result

    def _fits_bias(self, module: Depth2) -> bool:
        recovery = self.method.recovery
        # Behind a norm, what is constant in the residual stream is no bias of level 2: a stored one stays as it is.
        wanted = module.bias is not None or recovery.intercept or recovery.method == "bias"
        return recovery.method != "none" and module.post_norm is None and wanted

    def _store(
        self, module: Depth2, norm: PostNorm, old: Tensor, fitted: Tensor, bias: Tensor | None, kept: Tensor
    ) -> None:
        """Put the fitted level 2 in place; entries that go are sliced away later."""
        full = norm.unscale(old).clone()
        full[kept] = norm.unscale(fitted)
        changes = {module.level2.name: stored_weight(module, full)}
        if bias is not None:
            changes[module.bias or f"{module.sink}.bias"] = bias
        self._change(changes)

    def _change(self, tensors: dict[str, Tensor]) -> None:
        """Use new values from here on, rounded as they will be written."""
        rounded = {name: tensor.to(self.dtype).float() for name, tensor in tensors.items()}
        self.changed |= {name: tensor.cpu() for name, tensor in rounded.items()}
        self.tensors |= rounded
        for name, tensor in rounded.items():
            assign(self.layer, name, tensor)

    def _advance(self, module: Depth2, x: Activations, kept: Tensor, stay: Tensor) -> None:
        """Level-2 outputs of the pruned module, from its stored inputs, of which those at `stay` are the kept ones."""
        weight = inner_weight(module, self.tensors)[kept].contiguous()
        bias = self.tensors.get(module.bias or f"{module.sink}.bias")
        for at in self.rows.batches():
            y = x[at][..., stay].to(weight.device, torch.float32) @ weight
            self.output[module.kind][at] = y if bias is None else y + bias

    def run_pruned(self, pruned: Activations) -> None:
        """Advance the pruned stream in place, and give the block's activations back."""
        for at in self.rows.batches():
            replay = {m: self.output[m.kind][at] for m in (self.block.attention, self.block.feed_forward)}
            pruned[at] = self._run(pruned, at, replay=replay)
        for tensor in (*self.goal.values(), *self.output.values(), *self.input.values()):
            self.arena.release(tensor)


def _keep(seen: dict[str, Tensor], name: str) -> Callable[[Tensor, Tensor], None]:
    """A watch that notes a layer's input."""
    return lambda x, _: seen.update({name: x})


def _keep_both(seen: dict[str, tuple[Tensor, Tensor]], name: str) -> Callable[[Tensor, Tensor], None]:
    """A watch that notes a layer's input and output."""
    return lambda x, z: seen.update({name: (x, z)})
