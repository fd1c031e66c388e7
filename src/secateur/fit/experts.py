"""A mixture of experts: which of its experts stay, and what the mixture then gives.

All is taken from the mixture's inputs in the pruned stream and from its target. Once experts are gone, the model's own
router sends their tokens to others; each of those, and the shared expert first, is then fitted to what the output still
lacks (block coordinate descent on the joint least squares), as `secateur.fit.expert_fit` has it.

Shapes: n tokens, d residual width.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.criteria.experts import TOKENS, Routed, expert_order
from secateur.criteria.statistics import module_seed
from secateur.fit.block import BlockState
from secateur.fit.expert_fit import ExpertFits, Tokens
from secateur.fit.module import ModuleReport, report_of
from secateur.fit.target import ModuleTarget
from secateur.model.arena import Activations
from secateur.model.held import plain
from secateur.model.mixture import Mixture
from secateur.model.structure import Depth2, Kind, Width
from secateur.model.surgery import inner_by_expert


class ExpertsState:
    """One mixture, while it is being pruned."""

    def __init__(self, state: BlockState, module: Depth2, pruned: Activations):
        self.state, self.module, self.pruned = state, module, pruned
        self.stream, self.recovery = state.stream, state.method.recovery
        self.target = ModuleTarget(state, module, pruned)
        self.mixture = Mixture(state.stream, state.layer, module)
        self.tokens = self._collect()

    def prune(
        self, width: Width, given: Mapping[Kind, tuple[int, ...]]
    ) -> tuple[dict[Kind, tuple[int, ...]], ModuleReport]:
        """Choose experts and channels unless they are given, refit, and put the pruned stream's output in place.

        Channels are named where some go.
        """
        keep = given["experts"] if "experts" in given else self._choose(width.experts)
        alive, cut = torch.tensor(keep, device=self.stream.device), width.channels < self.module.inner
        with self.stream.rounded():
            fits = ExpertFits(self.state, self.mixture, self.tokens, alive, width.channels)
            if cut and given.get("channels"):
                fits.kept |= self._by_expert(keep, given["channels"])
            before = self.tokens.error(fits.left)
            if self.recovery.fits or cut:
                self._refit(fits, alive)
        self._advance(alive)
        count = self.stream.team.total(float(self.tokens.weight_n.sum(dtype=torch.float64)))
        report = report_of(self.target, len(keep), self.tokens.error(fits.left), before, count)
        found: dict[Kind, tuple[int, ...]] = {"experts": keep}
        if cut:
            parts = [*keep, *([self.module.units] if self.module.times else [])]
            every = torch.cat([expert * self.module.inner + fits.kept[expert].cpu() for expert in parts])
            found["channels"] = tuple(every.tolist())
        return found, replace(report, unfitted=tuple(fits.unfitted))

    def _collect(self) -> Tokens:
        """All tokens at the mixture."""
        # One of several processes may have no tokens.
        none = torch.empty(0, self.stream.width, device=self.stream.device)
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]] = [
            (none, none, none[:, 0], none[:, 0], none[:, :1])
        ]
        for at in self.state.rows.batches():
            seen = self.state.inputs_of(self.module, self.pruned, at, self.module.source)[self.module.source]
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
            self.stream.team,
        )

    def _choose(self, stay: int) -> tuple[int, ...]:
        """The experts that stay, by the criterion."""
        if stay == self.module.units:
            return tuple(range(stay))
        tokens = self.tokens
        counted = tokens.score_n.nonzero()[:, 0]
        some = counted[:: max(1, len(counted) * self.stream.team.size // TOKENS)]
        routed = Routed(
            self.mixture,
            tokens.x_nd[some],
            tokens.wanted_nd[some],
            tokens.score_n[some],
            lambda y, which: tokens.unit(y, some[which]),
            self.stream.team,
        )
        choice, seed = self.state.method.criteria.choice, self.state.method.seed
        found = expert_order(choice.experts, routed, stay, module_seed(seed, self.state.index, self.module.kind))
        return tuple(sorted(set(range(self.module.units)) - set(found.order)))

    def _by_expert(self, keep: tuple[int, ...], channels: tuple[int, ...]) -> dict[int, Tensor]:
        """Given channels, by the expert whose they are."""
        each, beside = inner_by_expert(self.module, len(keep), channels)
        every = (*zip(keep, each, strict=True), (self.module.units, beside))
        return {expert: part.to(self.stream.device) for expert, part in every}

    def _refit(self, fits: ExpertFits, alive: Tensor) -> None:
        """Fit one expert after the other, and give the block what comes out."""
        state, mixture, module = self.state, self.mixture, self.module
        level1 = f"{module.level2.layer}.{mixture.names.stored[0][0]}"
        names = [module.level2.name, *([level1] if self.recovery.fits_level1 else [])]
        for name in names:
            # One by one: they are nearly all of the block, and each is there twice while it is copied.
            state.change({name: plain(state.tensors[name]).to(state.dtype, copy=True)})
        for expert in mixture.parts(alive):
            fitted = fits.fit(expert)
            if fitted is not None and expert == module.units:
                state.change({f"{module.path}.{mixture.names.shared_expert}.down_proj.weight": fitted.T.contiguous()})
            elif fitted is not None:
                mixture.put(expert, {"down_proj.weight": fitted.T})
        for name in names:
            state.change({name: plain(state.tensors[name])})

    def _advance(self, alive: Tensor) -> None:
        """The mixture's outputs in the pruned stream."""
        state = self.state
        output = state.output[self.module.kind] = state.arena.empty(state.rows, self.stream.width)
        place = 0
        for at in state.rows.batches():
            count = state.rows.ids(at).numel()
            output[at] = self.mixture.output(self.tokens.x_nd[None, place : place + count], alive)[0]
            place += count
