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
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.criteria.experts import TOKENS, Routed, expert_order
from secateur.criteria.order import removal_order, survivors
from secateur.criteria.registry import all_criteria
from secateur.criteria.statistics import Statistics, module_seed
from secateur.fit.block import BlockState
from secateur.fit.level1 import Part, Tangent
from secateur.fit.module import ModuleReport, report_of
from secateur.fit.target import ModuleTarget
from secateur.model.arena import Activations
from secateur.model.mixture import Mixture, Routes
from secateur.model.rows import Batch
from secateur.model.structure import Depth2, Kind, Width
from secateur.model.surgery import assign, inner_by_expert
from secateur.numerics.moments import Moments
from secateur.numerics.ridge import least_squares

FEWEST, FEWEST_LEVEL1 = 8, 64
"""An expert that meets fewer tokens keeps its weights, or those of level 1."""


class _Part(NamedTuple):
    """One expert's part of the least squares."""

    expert: int
    tokens: Tensor
    """Those that meet it (m)."""
    rows: Tensor
    """Its level-2 inputs times its gate (m x f)."""
    target: Tensor
    """What it is to give (m x d)."""
    old: Tensor
    """Its level-2 weight (f x d), in the units in which errors count."""
    owner: int
    """Of several processes, the one that solves it."""
    met: float
    """How many tokens count in the fit."""
    ridge: float


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
            each, beside = inner_by_expert(self.module, len(keep), given["channels"])
            self._kept |= {expert: part.to(self.stream.device) for expert, part in zip(keep, each, strict=True)}
            self._kept[self.module.units] = beside.to(self.stream.device)
        alive = torch.tensor(keep, device=self.stream.device)
        with self.stream.rounded():
            left = self._wanted - self._unit(self._output(self._x, alive))
            plain = self._sum(left)
            if self.recovery.fits or cut:
                self._refit(left, alive, width.channels)
        self._advance(alive)
        count = self.stream.team.total(float(self._weight.sum(dtype=torch.float64)))
        report = report_of(self.target, len(keep), self._sum(left), plain, count)
        found: dict[Kind, tuple[int, ...]] = {"experts": keep}
        if cut:
            parts = [*keep, *([self.module.units] if self.module.times else [])]
            every = torch.cat([expert * self.module.inner + self._kept[expert].cpu() for expert in parts])
            found["channels"] = tuple(every.tolist())
        return found, replace(report, unfitted=tuple(self._unfitted))

    def _sum(self, left: Tensor, tokens: Tensor | None = None) -> float:
        """The squared error of all tokens, or of some."""
        weight = self._weight if tokens is None else self._weight[tokens]
        return self.stream.team.total(float((weight * left.square().sum(1)).sum(dtype=torch.float64)))

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
        found = self.state.inputs_of(self.module, self.pruned, at, self.module.source)[self.module.source]
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
        both, level1 = self.recovery.fits_level1, f"{module.level2.layer}.{mixture.names.stored[0][0]}"
        names = [module.level2.name, *([level1] if both else [])]
        changed = {name: self._copied(name) for name in names}
        routes = mixture.route(self._x, alive)
        for expert in mixture.parts(alive):
            beside = expert == module.units
            share = stay * module.times if beside else stay
            tokens, rows = self._rows(expert, routes)
            fitted = self._solve(left, tokens, rows, expert, share)
            if fitted is None:
                continue
            if beside:
                name = f"{module.path}.{mixture.names.shared}.down_proj.weight"
                self.state.change({name: fitted.T.contiguous()})
                continue
            if both and self._met(tokens) >= FEWEST_LEVEL1:
                fitted = self._fit_both(left, expert, routes, share, rows, fitted)
            changed[module.level2.name][expert] = fitted if mixture.layout.inputs_first else fitted.T
        self.state.use(changed)

    def _copied(self, name: str) -> Tensor:
        """A tensor of all experts in the place of the dense one, rounded as it will be written.

        This is most of the block: whatever else is made of it in one piece shows in the peak.
        """
        copied = self.state.tensors[name].clone()
        for own in copied:
            own.copy_(own.to(self.state.dtype))
        assign(self.state.layer, name, copied)
        self.state.tensors[name] = copied
        return copied

    def _fit_both(
        self, left: Tensor, expert: int, routes: Routes, stay: int, rows: Tensor, fitted_fd: Tensor
    ) -> Tensor:
        """Level 1 of an expert after a fit of level 2, and level 2 anew; as they were where nothing is gained."""
        tokens, _ = routes.of(expert)
        tensors, before = self.mixture.alone(expert)[1], left[tokens]
        kept = {name: tensor.clone() for name, tensor in tensors.items()}
        self._step(left, tokens, expert, routes, fitted_fd)
        _, new = self._rows(expert, routes)
        left.index_add_(0, tokens, (rows - new) @ self.norm.scale(fitted_fd))
        again = self._solve(left, tokens, new, expert, stay, fitted_fd)
        errors = [self._sum(error, tokens) for error in (before, left[tokens])]
        if again is not None and errors[1] < errors[0]:
            return again
        left[tokens] = before
        for name, tensor in kept.items():
            tensors[name].copy_(tensor)
        return fitted_fd

    def _rows(self, expert: int, routes: Routes) -> tuple[Tensor, Tensor]:
        """The tokens that meet an expert, and its level-2 inputs as errors count."""
        tokens, rows = self.mixture.gated(expert, self._x, routes)
        return tokens, rows if self._scale is None else rows * self._scale[tokens][:, None]

    def _met(self, tokens: Tensor) -> float:
        """How many of the tokens of all processes count in the fit."""
        return self.stream.team.total(float(self._weight[tokens].count_nonzero()))

    def _step(self, left: Tensor, tokens: Tensor, expert: int, routes: Routes, fitted_fd: Tensor) -> None:
        """Level 1 of one expert, in place, by a Gauss-Newton step at a fit of level 2 (`fit/level1.py`)."""
        mixture, team, device = self.mixture, self.stream.team, self.stream.device
        own, tensors = mixture.alone(expert)
        kept = self._kept.get(expert, torch.arange(len(fitted_fd), device=device))
        x, root = self._x[tokens], self._weight[tokens].sqrt()[:, None]
        weight = root * routes.of(expert)[1][:, None] * (1 if self._scale is None else self._scale[tokens][:, None])
        found, source = [slope[:, kept] * weight for slope in mixture.slopes(expert, x)], mixture.read(expert, x)
        # Float32: sums over tokens would be rounded otherwise by two processes than by one.
        part = Part(source, found)
        met = self._met(tokens)
        tangent = Tangent(self.norm.scale(fitted_fd)[kept], len(found), source.shape[1], int(met), team)
        tangent.add(part, left[tokens] * root, root)
        ridge = self.recovery.ridge * (1 + len(fitted_fd) / met)
        changes = tangent.step(lambda: [part], ridge, self.recovery.level1)
        shared = team.shared({str(number): change for number, change in enumerate(changes)}, 0, device)
        for slab, change in zip(own.scored, shared.values(), strict=True):
            value = tensors[slab.name]
            value[kept] = (value[kept] + change).to(self.state.dtype).float()

    def _solve(
        self, left: Tensor, tokens: Tensor, rows: Tensor, expert: int, stay: int, now_fd: Tensor | None = None
    ) -> Tensor | None:
        """The level-2 weight (f x d) of one expert, from its `_rows`.

        `left` loses what it gains over the weight that is there now, the old one by default. So many channels stay, and
        the rows of others are zero; none given is all of them. None where there is nothing to go by.
        """
        team, old = self.stream.team, self.norm.scale(self.mixture.weight(expert))
        now = old if now_fd is None else self.norm.scale(now_fd)
        met = self._met(tokens)
        refitted, cut = self.recovery.fits and met >= FEWEST, 0 < stay < len(old)
        if expert < self.module.units and self.recovery.fits and not refitted:
            self._unfitted.append(expert)
        if not (refitted or cut):
            return None
        ridge = self.recovery.ridge * (1 + len(old) / max(met, 1.0))
        owner = team.owner(len(old) ** 2 * (len(old) + 2 * self.stream.width))
        part = _Part(expert, tokens, rows, left[tokens] + rows @ now, old, owner, met, ridge)
        stats = self._statistics(part, self._weight)
        kept = self._channels(part, stats, stay) if cut else torch.arange(len(old), device=rows.device)
        fitted = torch.zeros_like(old)
        if refitted:
            # Each asks for the normal equations, which the owner alone sets up, and once.
            found = team.solved(owner, lambda: {"w": least_squares(stats.normal, kept)[0]}, self.stream.device)
            fitted[kept] = found["w"]
        else:
            fitted[kept] = old[kept]
        fitted = self.norm.unscale(fitted).to(self.state.dtype).float()
        left.index_add_(0, tokens, rows @ (now - self.norm.scale(fitted)))
        return fitted

    def _statistics(self, part: _Part, weight_n: Tensor) -> Statistics:
        """What the criterion and the refit of one expert go by; its owner's are of the tokens of all processes."""
        moments = Moments(len(part.old), self.stream.width, device=self.stream.device)
        moments.update(part.rows, part.target, 1.0, weight_n[part.tokens])
        moments.reduce(self.stream.team, part.owner)
        module, tensors = self.mixture.alone(part.expert)
        seed = module_seed(self.state.method.seed, self.state.index, "channels") + part.expert
        return Statistics(module, tensors, part.old, moments, None, part.ridge, own_target=False, seed=seed)

    def _channels(self, part: _Part, stats: Statistics, stay: int) -> Tensor:
        """The channels of one expert that stay, by their weights alone where next to no token met it."""
        if part.expert in self._kept:
            return self._kept[part.expert]
        team, named = self.stream.team, self.state.method.criteria.named("channels")
        # No backward pass is made through experts: where one is asked for, the default takes over.
        criterion = all_criteria()["surgeon"] if named.from_gradients is not None else named
        if self.state.rows.scores is not None:
            # Rows may choose that nothing is fitted to.
            stats = self._statistics(part, self._score)
        if criterion.inputs:
            stats.inputs = Moments(self.stream.width, device=self.stream.device)
            read = self.mixture.read(part.expert, self._x[part.tokens])
            stats.inputs.update(read, weights_n=self._score[part.tokens])
            stats.inputs.reduce(team, part.owner)

        def chosen() -> dict[str, Tensor]:
            if part.met < FEWEST:
                worth = stats.unit_sums("square")
                return {"kept": worth.argsort(descending=True, stable=True)[:stay].sort().values}
            gone = removal_order(criterion, stats, "channels", stay)
            return {"kept": torch.tensor(survivors(stats.module, "channels", gone), device=self.stream.device)}

        self._kept[part.expert] = team.solved(part.owner, chosen, self.stream.device)["kept"]
        return self._kept[part.expert]

    def _advance(self, alive: Tensor) -> None:
        """The mixture's outputs in the pruned stream."""
        state = self.state
        output = state.output[self.module.kind] = state.arena.empty(state.rows, self.stream.width)
        place = 0
        for at in state.rows.batches():
            count = state.rows.ids(at).numel()
            output[at] = self._output(self._x[place : place + count], alive)
            place += count
