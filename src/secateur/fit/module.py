"""One module of a block: which of its units stay, and how these are refitted.

The pruned stream is run up to the module's level 2; the moments of its input with the target decide both. These inputs
are kept for the length of a module, so that outputs after the refit cost one product.

Shapes: n tokens, a level-2 input entries, k of them kept, d residual width; rows x t x d for stored activations.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.criteria.order import removal_order, survivors
from secateur.criteria.statistics import Statistics, module_seed
from secateur.fit.block import BlockState
from secateur.fit.inputs import Inputs, collect
from secateur.fit.level1_step import level1_step
from secateur.fit.recovery import Fit, compensation, fit_level1, fit_level2, intercept
from secateur.fit.target import ROUNDING, ModuleTarget
from secateur.model.arena import Activations
from secateur.model.structure import Depth2, Kind, Pattern, Width
from secateur.model.surgery import inner_entries, inner_weight, stored_weight
from secateur.numerics.moments import Moments
from secateur.numerics.ridge import Normal, residual


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
    plain: float
    """What that was before the refit, with the old weights of the units that stay."""
    unfitted: tuple[int, ...] = ()
    """Experts that met too few tokens to be refitted, and keep their weights."""


def report_of(target: ModuleTarget, kept: int, error: float, plain: float, count: float) -> ModuleReport:
    """The report of a module whose fit leaves an error, and began with a plain one, summed over what tokens count."""
    state, module = target.state, target.module
    energy = state.stream.team.total(state.goal[module.kind].energy(state.rows, target.norm.read_o))
    error, plain = (value * target.multiplier**2 for value in (error, plain))
    after, before = (value / energy if energy else 0.0 for value in (error, plain))
    return ModuleReport(module.kind, kept, module.units, error / count, after, before)


def _fitted(moments: Moments, normal: Normal, keep: Tensor) -> Fit:
    """A fit of level 2, with the error that it began with."""
    plain = residual(normal, normal.old_ao[keep], keep)
    return fit_level2(moments, normal, keep)._replace(plain=plain)


class ModuleState:
    """One module, while it is being pruned."""

    def __init__(self, state: BlockState, module: Depth2, pruned: Activations):
        self.state, self.module, self.pruned = state, module, pruned
        self.stream, self.method, self.recovery = state.stream, state.method, state.method.recovery
        self.target = ModuleTarget(state, module, pruned)
        self.norm = self.target.norm
        inner = self.module.units * self.module.size
        self.owner = self.stream.team.owner(inner**2 * (inner + 2 * self.stream.width))
        """Of several processes, the one that solves what asks for the moments of all rows."""

    def prune(self, width: Width, given: tuple[int, ...] | None) -> tuple[tuple[int, ...], ModuleReport]:
        """Choose the module's units unless they are given, refit it, and put the pruned stream's output in place."""
        module, recovery = self.module, self.recovery
        if recovery.method == "paper" and recovery.before:
            self._refit_level1()
        old = self.norm.scale(inner_weight(module, self.state.tensors))
        # Where units are given, a refit would not look at inputs that go.
        spared = bool(given) and recovery.method == "refit" and not recovery.before
        inputs, scored, source = collect(self.target, self.owner, given if spared else None)
        stats = self._statistics(inputs.weights(old), inputs.moments, source)
        choice = stats if scored is inputs.moments else self._statistics(old, scored, source)
        weight, bias = old, None
        if recovery.before:
            weight, bias, *_ = self._solved(lambda: fit_level2(inputs.moments, stats.normal, inputs.entries))
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
            inputs, _, _ = collect(self.target, self.owner)
            stats = self._statistics(old, inputs.moments)
        if recovery.after:
            fit = self._solved(lambda: _fitted(inputs.moments, stats.normal, inputs.among(kept)))
            plain = fit.plain
            # As large as all that fitting both holds.
            del stats
            # An error that is rounding alone asks for nothing.
            if recovery.fits_level1 and module.scored and keep and fit.error > ROUNDING * inputs.moments.energy():
                inputs, fit = self._fit_both(keep, inputs, fit)
            fitted, bias, error, _ = fit
        else:

            def unchanged() -> Fit:
                left = residual(stats.normal, weight[kept], kept)
                return Fit(weight[kept], None, left, left)

            fit = self._solved(unchanged)
            fitted, _, error, plain = fit
        if recovery.method == "bias" and self.target.fits_bias:
            bias = compensation(inputs.moments, old, kept, self.state.tensors.get(module.bias_name))
            # Centred moments leave the mean out of the error.
            error += inputs.moments.count * float(
                (intercept(inputs.moments, fitted, kept) - bias).double().square().sum()
            )
        self._store(old, fitted, bias, kept)
        self._advance(inputs, kept)
        self.state.arena.release(inputs.stored)
        return keep, report_of(self.target, len(keep), error, plain, inputs.moments.count)

    def _solved(self, make: Callable[[], Fit]) -> Fit:
        """A fit that the module's owner makes of the moments."""

        def made() -> dict[str, Tensor]:
            fit = make()
            found = {"weight": fit.weight_ko, "errors": torch.tensor([fit.error, fit.plain], dtype=torch.float64)}
            return found if fit.bias is None else found | {"bias": fit.bias}

        found = self.stream.team.solved(self.owner, made, self.stream.device)
        return Fit(found["weight"], found.get("bias"), *found["errors"].tolist())

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

        def made() -> dict[str, Tensor]:
            return {"gone": removal_order(criterion, stats, pattern, stop)}

        return survivors(module, pattern, self.stream.team.solved(self.owner, made, self.stream.device)["gone"])

    def _refit_level1(self) -> None:
        """Level 1 to the dense level-1 outputs, all rows: each is a regression of its own, whatever is kept."""
        module, width = self.module, self.stream.width
        # What all heads share a latent vector with reads that one, not the module's input.
        if not module.level1 or module.reader is not None:
            return
        biased = any(slab.name.endswith(".bias") for slab in module.level1)
        moments = Moments(width, width, centre=biased, device=self.stream.device)
        for at in self.state.rows.batches():
            dense = self.state.input[module.kind][at].to(self.stream.device)
            source = self.state.inputs_of(module, self.pruned, at, module.source)[module.source]
            moments.update(source.reshape(-1, width), dense.reshape(-1, width), at.weight)
        moments.reduce(self.stream.team, self.owner)

        def made() -> dict[str, Tensor]:
            return fit_level1(module, self.state.tensors, moments, self.recovery.ridge)

        self.state.change(self.stream.team.solved(self.owner, made, self.stream.device))

    def _fit_both(self, keep: tuple[int, ...], inputs: Inputs, fit: Fit) -> tuple[Inputs, Fit]:
        """Level 1 of the feed-forward fitted along, then level 2 once more; all as it was where that gains nothing.

        Takes a fit of level 2 and the inputs that it is for, and returns those that hold then, of kept units alone.
        """
        module, state = self.module, self.state
        before = {slab.name: state.tensors[slab.name] for slab in module.scored}
        state.change(level1_step(self.target, self._entries(keep), inputs, fit))
        state.arena.release(inputs.stored)
        inputs, _, _ = collect(self.target, self.owner, keep)
        old = inputs.weights(self.norm.scale(inner_weight(module, state.tensors)))
        everything = inputs.among(inputs.entries)
        again = self._solved(
            lambda: fit_level2(inputs.moments, self._statistics(old, inputs.moments).normal, everything)
        )
        if again.error < fit.error:
            return inputs, again
        state.change(before)
        state.arena.release(inputs.stored)
        return collect(self.target, self.owner, keep)[0], fit

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
        module, state = self.module, self.state
        outputs_of = inputs.times(inner_weight(module, state.tensors)[kept], kept)
        bias = state.tensors.get(module.bias_name)
        output = state.output[module.kind] = state.arena.empty(state.rows, self.stream.width)
        for at in state.rows.batches():
            # Inputs and weights are rounded already; the massive activations of a few tokens must not be.
            with self.stream.rounded():
                y = outputs_of(at)
            output[at] = y if bias is None else y + bias
