"""The stages of a block: modules whose outputs add up, pruned together.

An attention or a feed-forward is a stage of one module. A mixture is a stage of many: which of its experts stay is
settled first, by a step of the stage itself; once experts are gone, the model's own router sends their tokens to
others. Each expert that is left, and the shared expert first, is then fitted as any module is. The target of every
module is the dense stream after the stage, minus the pruned stream without this module.

Shapes: n tokens, d residual width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.criteria.experts import MAX_TOKENS, expert_order
from secateur.criteria.routed_tokens import RoutedTokens
from secateur.criteria.statistics import module_seed
from secateur.fit.block import BlockState
from secateur.fit.block_regression import BlockRegression
from secateur.fit.expert_regression import ExpertRegression, Tokens
from secateur.fit.module import fit_module
from secateur.fit.target import ModuleTarget
from secateur.model.arena import Activations
from secateur.model.axes import Width
from secateur.model.held import plain
from secateur.model.mixture import Mixture
from secateur.model.structure import KeptUnits, PrunableModule
from secateur.model.surgery import inner_by_expert
from secateur.model.units.channels import CHANNELS


@dataclass(frozen=True)
class ModuleReport:
    """The result of one stage, as a run reports it."""

    kind: str
    kept: int
    units: int
    error: float
    """||XW - T||^2 per token, without the penalty; in the residual stream's units, or as later layers read it."""
    relative: float
    """The same over the energy of the dense residual stream after the stage."""
    relative_before: float
    """Relative error before the refit, with the old weights of the units that stay."""
    unfitted: tuple[int, ...] = ()
    """Experts with too few tokens to be refitted; they keep their weights."""


def prune_stage(
    state: BlockState, module: PrunableModule, pruned: Activations, width: Width, given: KeptUnits
) -> tuple[dict[str, tuple[int, ...]], ModuleReport]:
    """Choose a stage's units unless they are given, refit its modules, and put its output in the pruned stream.

    Args:
        module: the attention, the feed-forward or the mixture.
        pruned: the pruned stream in front of the block.
        width: how many units stay.
        given: units that stay, where they are settled.
    """
    stage = MixtureStage if module.kind == "experts" else SingleStage
    return stage(state, module, pruned).prune(width, given)


def _report(target: ModuleTarget, kept: int, error: float, plain: float, count: float) -> ModuleReport:
    """Return the report of a stage from its summed errors behind and before the fit."""
    state, module = target.state, target.module
    energy = state.stream.processes.total(state.goal[module.kind].energy(state.rows, target.norm.read_o))
    error, plain = (value * target.multiplier**2 for value in (error, plain))
    after, before = (value / energy if energy else 0.0 for value in (error, plain))
    return ModuleReport(module.kind, kept, module.units, error / count, after, before)


class SingleStage:
    """A stage of one module."""

    def __init__(self, state: BlockState, module: PrunableModule, pruned: Activations):
        self.module, self.regression = module, BlockRegression(state, module, pruned)

    def prune(self, width: Width, given: KeptUnits) -> tuple[dict[str, tuple[int, ...]], ModuleReport]:
        """See `prune_stage`."""
        module, regression = self.module, self.regression
        axis = next((axis.name for axis in module.axes if width[axis.name] < axis.units), module.axes[0].name)
        found = fit_module(regression, axis, width[axis], given.get(module.kind))
        regression.store(found)
        regression.advance(found)
        errors = found.fit.error, found.fit.old_error
        report = _report(regression.target, len(found.keep), *errors, found.sums.fitted.count)
        return {module.kind: found.keep}, report


class MixtureStage:
    """A stage of many modules, each with a gate per token: the experts of a mixture."""

    def __init__(self, state: BlockState, module: PrunableModule, pruned: Activations):
        self.state, self.module, self.stream, self.recovery = state, module, state.stream, state.method.recovery
        self.target = ModuleTarget(state, module, pruned)
        self.mixture = Mixture(state.stream, state.layer, module)
        self.tokens = self._collect(pruned)

    def prune(self, width: Width, given: KeptUnits) -> tuple[dict[str, tuple[int, ...]], ModuleReport]:
        """See `prune_stage`."""
        tokens, module = self.tokens, self.module
        keep = given["experts"] if "experts" in given else self._choose(width.experts)
        alive, cut = torch.tensor(keep, device=self.stream.device), width.channels < module.units_inside
        channels, unfitted = self._by_expert(keep, given.get("channels", ()) if cut else ()), list[int]()
        with self.stream.rounded():
            residual = tokens.target_nd - tokens.unit(self.mixture.output(tokens.x_nd[None], alive)[0])
            before = tokens.error(residual)
            if self.recovery.fits or cut:
                unfitted = self._fit(alive, residual, width.channels, channels)
        self._advance(alive)
        count = self.stream.processes.total(float(tokens.weight_n.sum(dtype=torch.float64)))
        report = _report(self.target, len(keep), tokens.error(residual), before, count)
        units: dict[str, tuple[int, ...]] = {"experts": keep}
        if cut:
            parts = [*keep, *([module.units] if module.shared_multiple else [])]
            units["channels"] = tuple(
                expert * module.units_inside + one for expert in parts for one in channels[expert]
            )
        return units, replace(report, unfitted=tuple(unfitted))

    def _collect(self, pruned: Activations) -> Tokens:
        """Run the pruned stream up to the mixture, for all tokens with their target."""
        # One of several processes may have no tokens.
        none = torch.empty(0, self.stream.width, device=self.stream.device)
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]] = [
            (none, none, none[:, 0], none[:, 0], none[:, :1])
        ]
        for at in self.state.rows.batches():
            seen = self.state.inputs_of(self.module, pruned, at, self.module.input_layer)[self.module.input_layer]
            wanted = self.target.of(at)
            counts = wanted.target.new_ones(len(wanted.target)) if wanted.counts is None else wanted.counts
            inputs = seen.reshape(-1, self.stream.width)
            parts.append((inputs, wanted.target, at.weight * counts, at.score * counts, wanted.scale))
        x, target, weight, score, scales = zip(*parts, strict=True)
        if not bool(torch.isfinite(torch.stack([part.sum() for part in (*x, *target)]).sum())):
            raise SecateurError(f"block {self.state.index}: the experts give NaN or infinite activations")
        return Tokens(
            torch.cat(x),
            torch.cat(target),
            torch.cat(weight),
            torch.cat(score),
            None if scales[-1] is None else torch.cat(scales)[:, 0],
            self.target.norm,
            self.stream.processes,
        )

    def _choose(self, stay: int) -> tuple[int, ...]:
        """Return the experts that stay, by the criterion."""
        if stay == self.module.units:
            return tuple(range(stay))
        tokens = self.tokens
        counted = tokens.score_n.nonzero()[:, 0]
        some = counted[:: max(1, len(counted) * self.stream.processes.size // MAX_TOKENS)]
        routed = RoutedTokens(
            self.mixture,
            tokens.x_nd[some],
            tokens.target_nd[some],
            tokens.score_n[some],
            lambda y, which: tokens.unit(y, some[which]),
            self.stream.processes,
        )
        choice, seed = self.state.method.criteria.choice, self.state.method.seed
        found = expert_order(choice.experts, routed, stay, module_seed(seed, self.state.index, self.module.role))
        return tuple(sorted(set(range(self.module.units)) - set(found.order)))

    def _by_expert(self, keep: tuple[int, ...], channels: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
        """Return given channels by the expert that has them; nothing where none are given."""
        if not channels:
            return {}
        each, shared = inner_by_expert(self.module, len(keep), channels)
        every = (*zip(keep, each.tolist(), strict=True), (self.module.units, shared.tolist()))
        return {expert: tuple(own) for expert, own in every}

    def _fit(self, alive: Tensor, residual_nd: Tensor, width: int, channels: dict[int, tuple[int, ...]]) -> list[int]:
        """Fit one expert after the other for what the output still lacks.

        Args:
            alive: experts that stay.
            residual_nd: what the mixture's output lacks of its target; brought up to date.
            width: number of channels of each expert that stay.
            channels: channels that stay, where they are given; those that are chosen are added.

        Returns:
            Experts with too few tokens for a refit.
        """
        state, mixture, module, unfitted = self.state, self.mixture, self.module, list[int]()
        names = mixture.stored_names(inputs=self.recovery.input_steps > 0)
        for name in names:
            # One by one: they are nearly all of the block, and each is there twice while it is copied.
            state.change({name: plain(state.tensors[name]).to(state.dtype, copy=True)})
        routes = mixture.route(self.tokens.x_nd, alive)
        for expert in mixture.parts(alive):
            one = ExpertRegression(state, mixture, self.tokens, routes, residual_nd, expert)
            stop = width * (module.shared_multiple if one.shared else 1) or one.module.units
            unfitted += [expert] if one.unfitted and not one.shared else []
            if not one.recovery.fits and stop == one.module.units:
                continue
            given = tuple(range(stop)) if stop == one.module.units else channels.get(expert)
            found = fit_module(one, CHANNELS, stop, given)
            one.store(found)
            channels[expert] = found.keep
        for name in names:
            state.change({name: plain(state.tensors[name])})
        return unfitted

    def _advance(self, alive: Tensor) -> None:
        """Put the mixture's outputs in the pruned stream in place."""
        state = self.state
        output = state.output[self.module.kind] = state.arena.empty(state.rows, self.stream.width)
        place = 0
        for at in state.rows.batches():
            count = state.rows.ids(at).numel()
            output[at] = self.mixture.output(self.tokens.x_nd[None, place : place + count], alive)[0]
            place += count
