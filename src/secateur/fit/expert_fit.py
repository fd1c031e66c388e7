"""The experts of a mixture, fitted one after the other to what its output still lacks.

An expert's inputs of level 2 are weighted by its gate, and it is pulled to its old weights the more the fewer tokens it
meets. Where channels go, an expert is a feed-forward of its own, and the criterion of channels sees the sums that it is
refitted by. Level 1 is fitted along by the step of `secateur.fit.level1`, and level 2 then anew.

Shapes: n tokens, m of them at an expert, d residual width, f channels of an expert.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.base.team import Team
from secateur.criteria.order import removal_order, survivors
from secateur.criteria.registry import all_criteria
from secateur.criteria.statistics import Statistics, module_seed
from secateur.fit.block import BlockState
from secateur.fit.level1 import Part, Tangent
from secateur.model.mixture import Mixture
from secateur.model.post_norm import PostNorm
from secateur.numerics.moments import Moments
from secateur.numerics.ridge import least_squares

FEWEST, FEWEST_LEVEL1 = 8, 64
"""An expert that meets fewer tokens keeps its weights, or those of level 1."""


@dataclass(frozen=True)
class Tokens:
    """What this process has of the tokens at a mixture."""

    x_nd: Tensor
    """The mixture's inputs."""
    wanted_nd: Tensor
    """What it is to give, in the units in which errors count."""
    weight_n: Tensor
    """What each counts in the fit."""
    score_n: Tensor
    """What each counts in the choice."""
    scale_n: Tensor | None
    """Of each one's error, if a norm asks for one."""
    norm: PostNorm
    team: Team

    def unit(self, y_md: Tensor, some: Tensor | None = None) -> Tensor:
        """Outputs of some tokens, or of all, in the units in which errors count."""
        return self.scaled(self.norm.scale(y_md), some)

    def scaled(self, values: Tensor, some: Tensor | None = None) -> Tensor:
        """Rows of some tokens, or of all, by the scale of these."""
        if self.scale_n is None:
            return values
        return values * (self.scale_n if some is None else self.scale_n[some])[:, None]

    def error(self, left_md: Tensor, some: Tensor | None = None) -> float:
        """The squared error of some tokens, or of all, over all processes."""
        weight = self.weight_n if some is None else self.weight_n[some]
        return self.team.total(float((weight * left_md.square().sum(1)).sum(dtype=torch.float64)))

    def met(self, some: Tensor) -> float:
        """How many tokens of all processes count in the fit."""
        return self.team.total(float(self.weight_n[some].count_nonzero()))


@dataclass(frozen=True)
class _Part:
    """One expert's part of the least squares."""

    expert: int
    tokens: Tensor
    """Those that meet it (m)."""
    rows_mf: Tensor
    """Its inputs of level 2, as errors count."""
    target_md: Tensor
    """What it is to give."""
    old_fd: Tensor
    """Its level-2 weight, in the units in which errors count."""
    met: float
    """How many tokens count in the fit."""
    owner: int
    """Of several processes, the one that solves it."""


class ExpertFits:
    """The fits of one mixture."""

    def __init__(self, state: BlockState, mixture: Mixture, tokens: Tokens, alive: Tensor, channels: int):
        """Begin with the experts that stay, so many channels of each, and their old weights.

        Attributes:
            left: what the mixture's output lacks (n x d), up to date behind each fit.
            kept: the channels of each expert that stay, where some go; those that are there are not chosen anew.
            unfitted: experts that met too few tokens.
        """
        self._state, self._mixture, self._tokens, self._channels = state, mixture, tokens, channels
        self._stream, self._norm, self._recovery = state.stream, tokens.norm, state.method.recovery
        self._routes = mixture.route(tokens.x_nd, alive)
        self.left = tokens.wanted_nd - tokens.unit(mixture.output(tokens.x_nd[None], alive)[0])
        self.kept: dict[int, Tensor] = {}
        self.unfitted: list[int] = []

    def fit(self, expert: int) -> Tensor | None:
        """An expert's new level-2 weight (f x d), zero for channels that go; None where it stays as it is.

        A new level 1 is in the block already.
        """
        tokens, rows = self._rows(expert)
        met = self._tokens.met(tokens)
        level2 = self._solve(expert, tokens, rows, met)
        # The shared one has a level 1 of its own kind, which is left as it is.
        apart = expert < self._mixture.module.units
        if level2 is None or not (apart and self._recovery.fits_level1 and met >= FEWEST_LEVEL1):
            return level2
        return self._fit_both(expert, tokens, rows, met, level2)

    def _rows(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens that meet an expert, and its inputs of level 2 (m x f) as errors count."""
        tokens, rows = self._mixture.gated(expert, self._tokens.x_nd, self._routes)
        return tokens, self._tokens.scaled(rows, tokens)

    def _solve(
        self, expert: int, tokens: Tensor, rows: Tensor, met: float, now_fd: Tensor | None = None
    ) -> Tensor | None:
        """The level-2 weight (f x d) of one expert, from its `_rows`, of which so many count; None where there is
        nothing to go by.

        What the output lacks loses what this gains over the weight that is there now, the old one by default.
        """
        mixture, team = self._mixture, self._stream.team
        old = self._norm.scale(mixture.weight(expert))
        now = old if now_fd is None else self._norm.scale(now_fd)
        beside = expert == mixture.module.units
        stay = self._channels * (mixture.module.times if beside else 1)
        refitted, cut = self._recovery.fits and met >= FEWEST, 0 < stay < len(old)
        if self._recovery.fits and not refitted and not beside:
            self.unfitted.append(expert)
        if not (refitted or cut):
            return None
        owner = team.owner(len(old) ** 2 * (len(old) + 2 * self._stream.width))
        part = _Part(expert, tokens, rows, self.left[tokens] + rows @ now, old, met, owner)
        stats = self._statistics(part, self._tokens.weight_n)
        kept = self._choose(part, stats, stay) if cut else torch.arange(len(old), device=rows.device)
        fitted = torch.zeros_like(old)
        if refitted:
            # Each asks for the normal equations, which the owner alone sets up, and once.
            found = team.solved(owner, lambda: {"w": least_squares(stats.normal, kept)[0]}, self._stream.device)
            fitted[kept] = found["w"]
        else:
            fitted[kept] = old[kept]
        fitted = self._norm.unscale(fitted).to(self._state.dtype).float()
        self.left.index_add_(0, tokens, rows @ (now - self._norm.scale(fitted)))
        return fitted

    def _ridge(self, channels: int, met: float) -> float:
        """The more, the fewer tokens."""
        return self._recovery.ridge * (1 + channels / max(met, 1.0))

    def _statistics(self, part: _Part, weight_n: Tensor) -> Statistics:
        """What the criterion and the refit of one expert go by; its owner's are of the tokens of all processes."""
        moments = Moments(len(part.old_fd), self._stream.width, device=self._stream.device)
        moments.update(part.rows_mf, part.target_md, 1.0, weight_n[part.tokens])
        moments.reduce(self._stream.team, part.owner)
        module, tensors = self._mixture.alone(part.expert)
        seed = module_seed(self._state.method.seed, self._state.index, "channels") + part.expert
        ridge = self._ridge(len(part.old_fd), part.met)
        return Statistics(module, tensors, part.old_fd, moments, None, ridge, own_target=False, seed=seed)

    def _choose(self, part: _Part, stats: Statistics, stay: int) -> Tensor:
        """The channels of one expert that stay, by their weights alone where next to no token met it."""
        if part.expert in self.kept:
            return self.kept[part.expert]
        team, tokens = self._stream.team, self._tokens
        # No backward pass is made through experts: where one is asked for, the default takes over.
        named = self._state.method.criteria.named("channels")
        criterion = all_criteria()["surgeon"] if named.from_gradients is not None else named
        if self._state.rows.scores is not None:
            # Rows may choose that nothing is fitted to.
            stats = self._statistics(part, tokens.score_n)
        if criterion.inputs:
            stats.inputs = Moments(self._stream.width, device=self._stream.device)
            read = self._mixture.read(part.expert, tokens.x_nd[part.tokens])
            stats.inputs.update(read, weights_n=tokens.score_n[part.tokens])
            stats.inputs.reduce(team, part.owner)

        def chosen() -> dict[str, Tensor]:
            if part.met < FEWEST:
                worth = stats.unit_sums("square")
                return {"kept": worth.argsort(descending=True, stable=True)[:stay].sort().values}
            gone = removal_order(criterion, stats, "channels", stay)
            return {"kept": torch.tensor(survivors(stats.module, "channels", gone), device=self._stream.device)}

        self.kept[part.expert] = team.solved(part.owner, chosen, self._stream.device)["kept"]
        return self.kept[part.expert]

    def _fit_both(self, expert: int, tokens: Tensor, rows: Tensor, met: float, level2_fd: Tensor) -> Tensor:
        """Level 1 of an expert after a fit of level 2, and level 2 anew; as they were where nothing is gained."""
        own, tensors = self._mixture.alone(expert)
        level1 = {slab.name: tensors[slab.name].clone() for slab in own.scored}
        before = self.left[tokens]
        self._mixture.put(expert, self._level1(expert, tokens, met, level1, level2_fd))
        _, new = self._rows(expert)
        self.left.index_add_(0, tokens, (rows - new) @ self._norm.scale(level2_fd))
        again = self._solve(expert, tokens, new, met, level2_fd)
        errors = [self._tokens.error(error, tokens) for error in (before, self.left[tokens])]
        if again is not None and errors[1] < errors[0]:
            return again
        self.left[tokens] = before
        self._mixture.put(expert, level1)
        return level2_fd

    def _level1(
        self, expert: int, tokens: Tensor, met: float, old: Mapping[str, Tensor], level2_fd: Tensor
    ) -> dict[str, Tensor]:
        """New matrices of level 1 in the place of the old ones (f x d each), by a step at a fit of level 2."""
        mixture, every = self._mixture, torch.arange(len(level2_fd), device=self._stream.device)
        kept, x = self.kept.get(expert, every), self._tokens.x_nd[tokens]
        root = self._tokens.weight_n[tokens].sqrt()[:, None]
        weight = self._tokens.scaled(root * self._routes.of(expert)[1][:, None], tokens)
        # Float32: sums over tokens would be rounded otherwise by two processes than by one.
        part = Part(mixture.read(expert, x), [slope[:, kept] * weight for slope in mixture.slopes(expert, x)])
        tangent = Tangent(self._norm.scale(level2_fd)[kept], len(old), x.shape[1], int(met), self._stream.team)
        tangent.add(part, self.left[tokens] * root, root)
        changes = tangent.step(lambda: [part], self._ridge(len(level2_fd), met), self._recovery.level1)
        new = {
            name: tensor.index_add(0, kept, change) for (name, tensor), change in zip(old.items(), changes, strict=True)
        }
        return {name: tensor.to(self._state.dtype) for name, tensor in new.items()}
