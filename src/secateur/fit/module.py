"""One module of a block: which of its units stay, and how these are refitted.

The pruned stream is run up to the module's level 2; the moments of its input with the target decide both. These inputs
are kept for the length of a module, so that outputs after the refit cost one product.

Shapes: n tokens, a level-2 input entries, k of them kept, d residual width; rows x t x d for stored activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.base.device import fast_dtype
from secateur.base.errors import SecateurError
from secateur.criteria.order import removal_order, survivors
from secateur.criteria.statistics import Statistics
from secateur.fit.block import BlockState
from secateur.fit.level1 import Part, Tangent, factors, outputs
from secateur.fit.recovery import Fit, compensation, fit_level1, fit_level2, intercept
from secateur.fit.target import ROUNDING, ModuleTarget
from secateur.model.arena import Activations
from secateur.model.families import activation_of
from secateur.model.rows import Batch
from secateur.model.structure import Kind, Pattern, Width
from secateur.model.surgery import inner_entries, inner_weight, stored_weight
from secateur.numerics.moments import Moments
from secateur.numerics.ridge import residual
from secateur.survey.survey import module_seed


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
class Inputs:
    """A module's level-2 input in the pruned stream, stored, and its moments with the target."""

    entries: Tensor
    """Which of its entries these are, ascending."""
    stored: Activations
    moments: Moments

    def among(self, kept: Tensor) -> Tensor:
        """Where kept entries lie among those stored."""
        return torch.searchsorted(self.entries, kept)

    def at(self, batch: Batch, stay: Tensor) -> Tensor:
        """A batch's inputs at some places among those stored (b x t x k), float32, on the device of these indices.

        What is stored lies on the host, which no index of another device takes.
        """
        return self.stored[batch].to(stay.device, torch.float32)[..., stay]

    def weights(self, old: Tensor) -> Tensor:
        """Rows of a level-2 weight for these entries."""
        return old if len(old) == len(self.entries) else old[self.entries]


class ModuleState:
    """One module, while it is being pruned."""

    def __init__(self, state: BlockState, kind: Kind, pruned: Activations):
        self.state, self.module, self.pruned = state, state.block.module(kind), pruned
        self.stream, self.method, self.recovery = state.stream, state.method, state.method.recovery
        self.target = ModuleTarget(state, self.module, pruned)
        self.norm = self.target.norm

    def prune(self, width: Width, given: tuple[int, ...] | None) -> tuple[tuple[int, ...], ModuleReport]:
        """Choose the module's units unless they are given, refit it, and put the pruned stream's output in place."""
        module, recovery = self.module, self.recovery
        if recovery.method == "paper" and recovery.before:
            self._refit_level1()
        old = self.norm.scale(inner_weight(module, self.state.tensors))
        # Where units are given, a refit would not look at inputs that go.
        spared = bool(given) and recovery.method == "refit" and not recovery.before
        inputs, scored, source = self._collect(given if spared else None)
        stats = self._statistics(inputs.weights(old), inputs.moments, source)
        choice = stats if scored is inputs.moments else self._statistics(old, scored, source)
        weight, bias = old, None
        if recovery.before:
            weight, bias, _ = fit_level2(inputs.moments, stats.normal, inputs.entries)
            choice.weight_ao, choice.pull_ao = weight, old
            changed = {module.level2.name: stored_weight(module, self.norm.unscale(weight))}
            choice.tensors = self.state.tensors | changed
        keep = self._choose(choice, width) if given is None else given
        # Its Gram matrix is as large as the one that is solved next.
        del choice, scored
        kept = self._entries(keep)
        if recovery.method == "paper" and not recovery.before:
            self._refit_level1()
            self.state.arena.release(inputs.stored)
            inputs, _, _ = self._collect()
            stats = self._statistics(old, inputs.moments)
        if recovery.after:
            fit = fit_level2(inputs.moments, stats.normal, inputs.among(kept))
            # An error that is rounding alone asks for nothing.
            if recovery.fits_level1 and module.scored and keep and fit.error > ROUNDING * stats.normal.energy:
                inputs, fit = self._fit_both(keep, inputs, fit)
            fitted, bias, error = fit
        else:
            fitted = weight[kept]
            error = residual(stats.normal, fitted, kept)
        if recovery.method == "bias" and self.target.fits_bias:
            bias = compensation(inputs.moments, old, kept, self.state.tensors.get(module.bias_name))
            # Centred moments leave the mean out of the error.
            error += inputs.moments.count * float(
                (intercept(inputs.moments, fitted, kept) - bias).double().square().sum()
            )
        self._store(old, fitted, bias, kept)
        self._advance(inputs, kept)
        self.state.arena.release(inputs.stored)
        energy = self.state.goal[module.kind].energy(self.state.rows, self.norm.read_o)
        relative = error / energy if energy else 0.0
        report = ModuleReport(module.kind, len(keep), module.units, error / inputs.moments.count, relative)
        return keep, report

    def _entries(self, keep: tuple[int, ...]) -> Tensor:
        return inner_entries(self.module, keep).to(self.stream.device)

    def _statistics(self, old: Tensor, moments: Moments, source: Moments | None = None) -> Statistics:
        module, index = self.module, self.state.index
        return Statistics(
            module=module,
            tensors=self.state.tensors,
            weight_ao=old,
            moments=moments,
            inputs=source,
            ridge=self.recovery.ridge,
            own_target=False,
            seed=module_seed(self.method.seed, index, module.kind),
        )

    def _collect(self, keep: tuple[int, ...] | None = None) -> tuple[Inputs, Moments, Moments | None]:
        """Run the pruned stream up to the module's level 2, for the inputs of all units or of those that stay.

        Beside what is fitted to: the moments to choose units by, which are the same ones unless the rows say
        otherwise, and for the same purpose those of the module's input. Neither is taken where units have been chosen.
        """
        module, stream, rows = self.module, self.stream, self.state.rows
        entries = self._entries(tuple(range(module.units)) if keep is None else keep)
        stored = self.state.arena.empty(rows, len(entries), stream.products)
        moments = Moments(len(entries), stream.width, centre=self.target.fits_bias, device=stream.device)
        scored, source, watched = moments, None, [module.sink]
        if keep is None and rows.scores is not None:
            scored = Moments(len(entries), stream.width, centre=moments.centre, device=stream.device)
        if keep is None and module.kind == "channels" and self.method.criteria.named(module.kind).inputs:
            source = Moments(stream.width, device=stream.device)
            watched.insert(0, module.source)
        for at in rows.batches():
            seen = self.state.inputs_of(module, self.pruned, at, *watched)
            x = seen[module.sink].flatten(0, -2)
            if keep is not None:
                x = x[:, entries]
            stored[at] = x
            wanted = self.target.of(at)
            x = wanted.scaled(x)
            # One entry where both are the same.
            for sums, weight in {scored: at.score, moments: at.weight}.items():
                if weight:
                    sums.update(x, wanted.target, weight, wanted.counts)
            if at.score and source is not None:
                source.update(seen[module.source].reshape(-1, stream.width), weight=at.score)
        if not (moments.finite() and scored.finite()):
            what = {"heads": "attention", "channels": "feed-forward"}[module.kind]
            raise SecateurError(f"block {self.state.index}: the {what} module gives NaN or infinite activations")
        return Inputs(entries, stored, moments), scored, source

    def _choose(self, stats: Statistics, width: Width) -> tuple[int, ...]:
        module = self.module
        pattern: Pattern = "channels"
        if module.kind == "heads":
            pattern = "groups" if width.groups < module.groups else "heads"
        stop = width.along(pattern)
        if stop == 0:
            return ()
        if stop == module.steps(pattern):
            return tuple(range(module.units))
        criterion = self.method.criteria.module(self.state.index, module.kind)
        return survivors(module, pattern, removal_order(criterion, stats, pattern, stop))

    def _refit_level1(self) -> None:
        """Level 1 to the dense level-1 outputs, all rows: each is a regression of its own, whatever is kept."""
        module, width = self.module, self.stream.width
        biased = any(slab.name.endswith(".bias") for slab in module.level1)
        moments = Moments(width, width, centre=biased, device=self.stream.device)
        for at in self.state.rows.batches():
            dense = self.state.input[module.kind][at].to(self.stream.device)
            source = self.state.inputs_of(module, self.pruned, at, module.source)[module.source]
            moments.update(source.reshape(-1, width), dense.reshape(-1, width), at.weight)
        self.state.change(fit_level1(module, self.state.tensors, moments, self.recovery.ridge))

    def _fit_both(self, keep: tuple[int, ...], inputs: Inputs, fit: Fit) -> tuple[Inputs, Fit]:
        """Level 1 of the feed-forward fitted along, then level 2 once more; all as it was where that gains nothing.

        Takes a fit of level 2 and the inputs that it is for, and returns those that hold then, of kept units alone.
        """
        module, state = self.module, self.state
        before = {slab.name: state.tensors[slab.name] for slab in module.scored}
        state.change(self._level1_step(self._entries(keep), inputs, fit))
        state.arena.release(inputs.stored)
        inputs, _, _ = self._collect(keep)
        old = inputs.weights(self.norm.scale(inner_weight(module, state.tensors)))
        everything = inputs.among(inputs.entries)
        again = fit_level2(inputs.moments, self._statistics(old, inputs.moments).normal, everything)
        if again.error < fit.error:
            return inputs, again
        state.change(before)
        state.arena.release(inputs.stored)
        return self._collect(keep)[0], fit

    def _level1_step(self, kept: Tensor, inputs: Inputs, fit: Fit) -> dict[str, Tensor]:
        """New level-1 weights, from one Gauss-Newton step at a fit of level 2."""
        module, state, device, width = self.module, self.state, self.stream.device, self.stream.width
        activation, dtype = activation_of(self.stream.checkpoint.config), fast_dtype(device)
        batches = [at for at in state.rows.batches() if at.weight]
        source = state.arena.empty(state.rows, width, dtype)
        stored = [state.arena.empty(state.rows, len(kept), dtype) for _ in module.scored]
        tangent = Tangent(fit.weight_ko, len(stored), width, sum(state.rows.ids(at).numel() for at in batches))
        stay = inputs.among(kept)
        for at in batches:
            s = state.inputs_of(module, self.pruned, at, module.source)[module.source].reshape(-1, width)
            wanted = self.target.of(at)
            counts = torch.ones(len(s), device=device) if wanted.counts is None else wanted.counts.sqrt()
            root = at.weight**0.5 * counts[:, None]
            scaled = wanted.scaled(root)
            given = inputs.at(at, stay).reshape(len(s), -1) @ fit.weight_ko
            target = wanted.target if fit.bias is None else wanted.target - fit.bias
            error = target * root - given * scaled
            found = [f * scaled for f in factors(activation, outputs(module, state.tensors, s, kept))]
            source[at] = s
            for room, factor in zip(stored, found, strict=True):
                room[at] = factor
            tangent.add(Part(s.to(dtype), [f.to(dtype) for f in found]), error.to(dtype), root)

        def parts() -> Iterator[Part]:
            for at in batches:
                s = source[at].to(device).reshape(-1, width)
                yield Part(s, [room[at].to(device).reshape(len(s), -1) for room in stored])

        changes = tangent.step(parts, self.recovery.ridge, self.recovery.level1)
        for room in (source, *stored):
            state.arena.release(room)
        result = {slab.name: state.tensors[slab.name].clone() for slab in module.scored}
        for slab, change in zip(module.scored, changes, strict=True):
            result[slab.name].index_add_(slab.axis, slab.offset + kept, change.movedim(0, slab.axis))
        return result

    def _store(self, old: Tensor, fitted: Tensor, bias: Tensor | None, kept: Tensor) -> None:
        """Put the fitted level 2 in place; entries that go are sliced away later."""
        full = self.norm.unscale(old).clone()
        full[kept] = self.norm.unscale(fitted)
        changes = {self.module.level2.name: stored_weight(self.module, full)}
        if bias is not None:
            changes[self.module.bias_name] = bias
        self.state.change(changes)

    def _advance(self, inputs: Inputs, kept: Tensor) -> None:
        """The module's level-2 outputs, from its stored inputs."""
        module, state, stay = self.module, self.state, inputs.among(kept)
        weight = inner_weight(module, state.tensors)[kept].contiguous()
        bias = state.tensors.get(module.bias_name)
        for at in state.rows.batches():
            y = inputs.at(at, stay) @ weight
            state.output[module.kind][at] = y if bias is None else y + bias
