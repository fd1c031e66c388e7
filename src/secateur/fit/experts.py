"""A mixture of experts: which of its experts stay, which of their channels, and how these are refitted.

All is taken from the mixture's inputs in the pruned stream and from its target. Once experts are gone, the model's own
router sends their tokens to others; each of those, and the shared expert first, is then solved for what the output
still lacks, one after the other (block coordinate descent on the joint least squares). An expert's inputs are
weighted by its gate, and it is pulled to its old weights the more the fewer tokens it meets. Where channels go, an
expert is a feed-forward of its own, and the criterion of channels sees the sums that it is refitted by.

Shapes: n tokens, d residual width, f channels of an expert.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.criteria.experts import TOKENS, Routed, expert_order
from secateur.criteria.order import removal_order, survivors
from secateur.criteria.registry import Criterion, all_criteria
from secateur.criteria.statistics import Statistics, module_seed
from secateur.fit.block import BlockState
from secateur.fit.module import ModuleReport, report_of
from secateur.fit.target import ModuleTarget
from secateur.model.arena import Activations
from secateur.model.mixture import Mixture
from secateur.model.rows import Batch
from secateur.model.structure import Depth2, Kind, Width
from secateur.numerics.moments import Moments
from secateur.numerics.ridge import least_squares

FEWEST = 8
"""An expert that meets fewer tokens keeps its weights."""


class ExpertsState:
    """One mixture, while it is being pruned."""

    def __init__(self, state: BlockState, module: Depth2, pruned: Activations):
        self.state, self.module, self.pruned = state, module, pruned
        self.stream, self.recovery = state.stream, state.method.recovery
        self.target = ModuleTarget(state, module, pruned)
        self.norm, self.mixture = self.target.norm, Mixture(state.stream, state.layer, module)
        self._x, self._wanted, self._weight, self._score, self._scale = self._collect()
        self._unfitted: list[int] = []
        self._kept: dict[int, Tensor] = {}
        """The channels of each expert that stay, where some go."""

    def prune(
        self, width: Width, given: Mapping[Kind, tuple[int, ...]]
    ) -> tuple[dict[Kind, tuple[int, ...]], ModuleReport]:
        """Choose experts and channels unless they are given, refit, and put the pruned stream's output in place.

        Channels are named where some go.
        """
        keep = given["experts"] if "experts" in given else self._choose(width.experts)
        cut = width.channels < self.module.inner
        if cut and given.get("channels"):
            self._kept |= self._by_expert(given["channels"])
        alive = torch.tensor(keep, device=self.stream.device)
        with self.stream.rounded():
            left = self._wanted - self._unit(self._output(self._x, alive))
            if self.recovery.fits or cut:
                self._refit(left, alive, width.channels)
        self._advance(alive)
        team = self.stream.team
        error = team.total(float((self._weight * left.square().sum(1)).sum(dtype=torch.float64)))
        count = team.total(float(self._weight.sum(dtype=torch.float64)))
        report = report_of(self.target, len(keep), error, count)
        found: dict[Kind, tuple[int, ...]] = {"experts": keep}
        if cut:
            every = torch.cat([expert * self.module.inner + self._kept[expert].cpu() for expert in keep])
            found["channels"] = tuple(every.tolist())
        return found, replace(report, unfitted=tuple(self._unfitted))

    def _by_expert(self, channels: tuple[int, ...]) -> dict[int, Tensor]:
        """The channels of each expert, of those of all counted through."""
        each: dict[int, list[int]] = {}
        for channel in channels:
            each.setdefault(channel // self.module.inner, []).append(channel % self.module.inner)
        return {expert: torch.tensor(own, device=self.stream.device) for expert, own in each.items()}

    def _collect(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Of all tokens: inputs (n x d), what the mixture is to give (n x d), what they count in the fit and in the
        choice (n; n), and the scale of outputs (n), if a norm asks for one."""
        parts = []
        for at in self.state.rows.batches():
            wanted = self.target.of(at)
            counts = wanted.target.new_ones(len(wanted.target)) if wanted.counts is None else wanted.counts
            parts.append((self._inputs(at), wanted.target, at.weight * counts, at.score * counts, wanted.scale))
        x, target, weight, score, scale = zip(*parts, strict=True)
        if not bool(torch.isfinite(torch.stack([part.sum() for part in (*x, *target)]).sum())):
            raise SecateurError(f"block {self.state.index}: the experts give NaN or infinite activations")
        scales = None if scale[0] is None else torch.cat(scale)[:, 0]
        return torch.cat(x), torch.cat(target), torch.cat(weight), torch.cat(score), scales

    def _inputs(self, at: Batch) -> Tensor:
        found = self.state.inputs_of(self.module, self.pruned, at, self.module.sink)[self.module.sink]
        return found.reshape(-1, self.stream.width)

    def _unit(self, y_nd: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Outputs of some tokens, or of all, in the units in which errors count."""
        scaled = self.norm.scale(y_nd)
        if self._scale is None:
            return scaled
        return scaled * (self._scale if tokens is None else self._scale[tokens])[:, None]

    def _output(self, x_nd: Tensor, alive: Tensor) -> Tensor:
        return self.mixture.output(x_nd[None], alive)[0]

    def _choose(self, stay: int) -> tuple[int, ...]:
        """The experts that stay, by the criterion."""
        if stay == self.module.units:
            return tuple(range(stay))
        counted = self._score.nonzero()[:, 0]
        some = counted[:: max(1, len(counted) * self.stream.team.size // TOKENS)]
        routed = Routed(
            self.mixture,
            self._x[some],
            self._wanted[some],
            self._score[some],
            lambda y, tokens: self._unit(y, some[tokens]),
            self.stream.team,
        )
        choice, seed = self.state.method.criteria.choice, self.state.method.seed
        found = expert_order(choice.experts, routed, stay, module_seed(seed, self.state.index, self.module.kind))
        return tuple(sorted(set(range(self.module.units)) - set(found.order)))

    def _refit(self, left: Tensor, alive: Tensor, stay: int) -> None:
        """Solve one expert after the other for what the output lacks (n x d), which is kept up to date."""
        mixture, module = self.mixture, self.module
        changed = self.state.tensors[module.level2.name].clone()
        if mixture.shared is not None and self.recovery.fits:
            everyone = torch.arange(len(left), device=left.device)
            rows = mixture.shared_inner(self._x) * mixture.shared_gates(self._x)[:, None]
            name = f"{module.path}.{mixture.names.shared}.down_proj.weight"
            fitted = self._solve(left, everyone, rows, self.state.tensors[name].T)
            if fitted is not None:
                self.state.change({name: fitted.T.contiguous()})
        routes = mixture.route(self._x, alive)
        for expert in alive.tolist():
            tokens, gates = routes.of(expert)
            rows = mixture.inner(expert, self._x[tokens]) * gates[:, None]
            fitted = self._solve(left, tokens, rows, mixture.weight(expert), expert, stay)
            if fitted is not None:
                changed[expert] = fitted if mixture.experts.is_transposed else fitted.T
        self.state.change({module.level2.name: changed})

    def _solve(
        self, left: Tensor, tokens: Tensor, rows: Tensor, old_fd: Tensor, expert: int | None = None, stay: int = 0
    ) -> Tensor | None:
        """The level-2 weight (f x d) of one expert, from its inputs times its gate at the tokens that it meets.

        `left` loses what it gains. Of an expert with a number, so many channels stay, and the rows of others are zero.
        None where nothing changes, as there is nothing to go by.
        """
        stream, old, count = self.stream, self.norm.scale(old_fd), len(old_fd)
        cut = expert is not None and stay < count
        if self._scale is not None:
            rows = rows * self._scale[tokens][:, None]
        target, owner = left[tokens] + rows @ old, stream.team.owner(count**2 * (count + 2 * stream.width))

        def summed(weight: Tensor) -> Moments:
            moments = Moments(count, stream.width, device=stream.device)
            moments.update(rows, target, 1.0, weight[tokens])
            moments.reduce(stream.team, owner)
            return moments

        moments, met = summed(self._weight), stream.team.total(float(self._weight[tokens].count_nonzero()))
        # Rows may choose that nothing is fitted to.
        scored = summed(self._score) if cut and self.state.rows.scores is not None else moments
        refitted, given = (
            self.recovery.fits and met >= FEWEST,
            self._kept.get(expert) if cut and expert is not None else None,
        )
        if expert is not None and self.recovery.fits and not refitted:
            self._unfitted.append(expert)
        if not (refitted or cut):
            return None
        ridge = self.recovery.ridge * (1 + count / max(met, 1.0))
        source = None if expert is None or not cut or given is not None else self._sources(tokens, owner)

        def made() -> dict[str, Tensor]:
            stats = self._statistics(expert, moments, old, ridge)
            kept = torch.arange(count, device=rows.device) if given is None else given
            if expert is not None and cut and given is None:
                choice = stats if scored is moments else self._statistics(expert, scored, old, ridge)
                choice.inputs = source
                kept = self._channels(choice, stay, blind=met < FEWEST)
            weight = least_squares(stats.normal, kept)[0] if refitted else old[kept]
            return {"weight": weight, "kept": kept}

        found = stream.team.solved(owner, made, stream.device)
        kept = found["kept"]
        if expert is not None and cut:
            self._kept[expert] = kept
        fitted = torch.zeros_like(old)
        fitted[kept] = found["weight"]
        fitted = self.norm.unscale(fitted).to(self.state.dtype).float()
        left.index_add_(0, tokens, rows @ (old - self.norm.scale(fitted)))
        return fitted

    def _statistics(self, expert: int | None, moments: Moments, old: Tensor, ridge: float) -> Statistics:
        module, tensors = (self.module, {}) if expert is None else self.mixture.alone(expert)
        seed = module_seed(self.state.method.seed, self.state.index, "channels")
        return Statistics(module, tensors, old, moments, None, ridge, own_target=False, seed=seed + (expert or 0))

    def _sources(self, tokens: Tensor, owner: int) -> Moments | None:
        """The moments of an expert's own input, where the criterion asks for them."""
        if not self._criterion.inputs:
            return None
        moments = Moments(self.stream.width, device=self.stream.device)
        moments.update(self._x[tokens], weights_n=self._score[tokens])
        moments.reduce(self.stream.team, owner)
        return moments

    @property
    def _criterion(self) -> Criterion:
        """Of the channels. No backward pass is made through experts: where one is asked for, the default takes over."""
        named = self.state.method.criteria.named("channels")
        return all_criteria()["surgeon"] if named.from_gradients is not None else named

    def _channels(self, stats: Statistics, stay: int, *, blind: bool) -> Tensor:
        """The channels of one expert that stay, by their weights alone where next to no token met it."""
        if blind:
            kept = stats.unit_sums("square").argsort(descending=True, stable=True)[:stay].sort().values
        else:
            gone = removal_order(self._criterion, stats, "channels", stay)
            kept = torch.tensor(survivors(stats.module, "channels", gone))
        return kept.to(self.stream.device)

    def _advance(self, alive: Tensor) -> None:
        """The mixture's outputs in the pruned stream."""
        state = self.state
        output = state.output[self.module.kind] = state.arena.empty(state.rows, self.stream.width)
        place = 0
        for at in state.rows.batches():
            count = state.rows.ids(at).numel()
            output[at] = self._output(self._x[place : place + count], alive)
            place += count
