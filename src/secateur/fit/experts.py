"""A mixture of experts: which of its experts stay, and how these are refitted.

All is taken from the mixture's inputs in the pruned stream and from its target. Once experts are gone, the model's own
router sends their tokens to others; each of those, and the shared expert first, is then solved for what the output
still lacks, one after the other (block coordinate descent on the joint least squares). An expert's inputs are
weighted by its gate, and it is pulled to its old weights the more the fewer tokens it meets.

Shapes: n tokens, d residual width, f channels of an expert.
"""

from dataclasses import replace

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.criteria.experts import TOKENS, Routed, expert_order
from secateur.criteria.statistics import module_seed
from secateur.fit.block import BlockState
from secateur.fit.module import ModuleReport, report_of
from secateur.fit.target import ModuleTarget
from secateur.model.arena import Activations
from secateur.model.mixture import Mixture
from secateur.model.rows import Batch
from secateur.model.structure import Depth2, Width
from secateur.numerics.moments import Moments
from secateur.numerics.ridge import least_squares, normal_equations

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

    def prune(self, width: Width, given: tuple[int, ...] | None) -> tuple[tuple[int, ...], ModuleReport]:
        """Choose the experts unless they are given, refit them, and put the pruned stream's output in place."""
        keep = self._choose(width.experts) if given is None else given
        alive = torch.tensor(keep, device=self.stream.device)
        with self.stream.rounded():
            left = self._wanted - self._unit(self._output(self._x, alive))
            if self.recovery.fits:
                self._refit(left, alive)
        self._advance(alive)
        team = self.stream.team
        error = team.total(float((self._weight * left.square().sum(1)).sum(dtype=torch.float64)))
        count = team.total(float(self._weight.sum(dtype=torch.float64)))
        report = report_of(self.target, len(keep), error, count)
        return keep, replace(report, unfitted=tuple(self._unfitted))

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

    def _refit(self, left: Tensor, alive: Tensor) -> None:
        """Solve one expert after the other for what the output lacks (n x d), which is kept up to date."""
        mixture, module = self.mixture, self.module
        changed = self.state.tensors[module.level2.name].clone()
        if mixture.shared is not None:
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
            fitted = self._solve(left, tokens, rows, mixture.weight(expert))
            if fitted is None:
                self._unfitted.append(expert)
            else:
                changed[expert] = fitted if mixture.experts.is_transposed else fitted.T
        self.state.change({module.level2.name: changed})

    def _solve(self, left: Tensor, tokens: Tensor, rows: Tensor, old_fd: Tensor) -> Tensor | None:
        """The level-2 weight (f x d) of one expert, from its inputs times its gate at the tokens that it meets.

        `left` loses what it gains. None where there is nothing to go by.
        """
        stream, old = self.stream, self.norm.scale(old_fd)
        if self._scale is not None:
            rows = rows * self._scale[tokens][:, None]
        moments = Moments(rows.shape[1], stream.width, device=stream.device)
        moments.update(rows, left[tokens] + rows @ old, 1.0, self._weight[tokens])
        owner = stream.team.owner(rows.shape[1] ** 2 * (rows.shape[1] + 2 * stream.width))
        met = stream.team.total(float(self._weight[tokens].count_nonzero()))
        moments.reduce(stream.team, owner)
        if met < FEWEST:
            return None

        def made() -> dict[str, Tensor]:
            (gram, cross), energy = moments.take(), moments.energy()
            ridge = self.recovery.ridge * (1 + rows.shape[1] / met)
            normal = normal_equations(gram, cross, energy, old, ridge, overwrite=True)
            return {"weight": least_squares(normal, torch.arange(len(old), device=old.device))[0]}

        fitted = self.norm.unscale(stream.team.solved(owner, made, stream.device)["weight"])
        fitted = fitted.to(self.state.dtype).float()
        left.index_add_(0, tokens, rows @ (old - self.norm.scale(fitted)))
        return fitted

    def _advance(self, alive: Tensor) -> None:
        """The mixture's outputs in the pruned stream."""
        state = self.state
        output = state.output[self.module.kind] = state.arena.empty(state.rows, self.stream.width)
        place = 0
        for at in state.rows.batches():
            count = state.rows.ids(at).numel()
            output[at] = self._output(self._x[place : place + count], alive)
            place += count
