"""The regression of one expert: its gate times its input, on the tokens routed to it, all of them in memory.

Experts of a mixture are fitted one after the other, each for what the mixture's output still lacks (block coordinate
descent on the joint least squares). The ridge of an expert is higher the fewer tokens are routed to it.

Shapes: n tokens, m of them routed to an expert, f channels of an expert, k of them kept, d residual width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.base.processes import Processes
from secateur.criteria.registry import Criterion, all_criteria
from secateur.criteria.statistics import module_seed
from secateur.fit.block import BlockState
from secateur.fit.input_projections import Part
from secateur.fit.module import Fitted
from secateur.fit.output_projection import OutputFit
from secateur.fit.recoveries.none import NoRecovery
from secateur.fit.recoveries.refit import Refit
from secateur.fit.recovery import Recovery
from secateur.fit.regression import AddPart, Regression, Sums
from secateur.model.axes import FEED_FORWARD
from secateur.model.mixture import Mixture, Routes
from secateur.model.post_norm import PostNorm
from secateur.numerics.moments import Moments

MIN_TOKENS, MIN_TOKENS_FOR_INPUTS = 8, 64
"""Fewest tokens of an expert that is refitted, and of one whose input projections are."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of this process at a mixture."""

    x_nd: Tensor
    """Inputs of the mixture."""
    target_nd: Tensor
    """Target of the whole mixture, in the units in which errors count."""
    weight_n: Tensor
    """Token weights in fits."""
    score_n: Tensor
    """Token weights in the choice of units."""
    scale_n: Tensor | None
    """Factor on each token's error, if a norm asks for one."""
    norm: PostNorm
    processes: Processes

    def unit(self, y_md: Tensor, some: Tensor | None = None) -> Tensor:
        """Return outputs of some tokens, or of all, in the units in which errors count."""
        return self.scaled(self.norm.scale(y_md), some)

    def scaled(self, values: Tensor, some: Tensor | None = None) -> Tensor:
        """Return rows of some tokens, or of all, times the scale of these tokens."""
        if self.scale_n is None:
            return values
        return values * (self.scale_n if some is None else self.scale_n[some])[:, None]

    def error(self, residual_nd: Tensor) -> float:
        """Return the squared error over all tokens of all processes."""
        return self.processes.total(float((self.weight_n * residual_nd.square().sum(1)).sum(dtype=torch.float64)))

    def number(self, some: Tensor) -> int:
        """Return how many of these tokens, in all processes, have a weight in the fit."""
        return int(self.processes.total(float(self.weight_n[some].count_nonzero())))


class Copies(Mapping[str, Tensor]):
    """Tensors that are copied to float32 when they are read."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].to(torch.float32, copy=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class ExpertRegression(Regression):
    """One expert of a mixture."""

    fits_bias = reports = False

    def __init__(
        self, state: BlockState, mixture: Mixture, tokens: Tokens, routes: Routes, residual_nd: Tensor, expert: int
    ):
        """Begin with an expert's old weights.

        Args:
            residual_nd: what the mixture's output lacks of its target; `store` brings it up to date.
            expert: its number; the shared expert's is behind all others.
        """
        self.state, self.mixture, self.expert, self.stream = state, mixture, expert, state.stream
        self.norm, self._batch, self._routes, self._residual_nd = tokens.norm, tokens, routes, residual_nd
        self.module = mixture.feed_forward(expert)
        self.shared = expert == mixture.module.units
        self.tokens = tokens.number(mixture.tokens(expert, routes))
        self.recovery = self._own(state.method.recovery)
        a, d = self.module.units, self.stream.width
        self.owner = self.stream.processes.assign_owner(a**2 * (a + 2 * d))
        self.seed = module_seed(state.method.seed, state.index, FEED_FORWARD) + expert
        self._target_md: Tensor | None = None

    def _own(self, whole: Recovery) -> Recovery:
        """Return the recovery of this expert by the number of its tokens."""
        number = self.tokens
        ridge = whole.ridge * (1 + self.module.units / max(number, 1))
        if not whole.fits or number < MIN_TOKENS:
            return NoRecovery(ridge)
        # The input projections of a shared expert stay as they are.
        inputs = not self.shared and number >= MIN_TOKENS_FOR_INPUTS
        return Refit(ridge, whole.input_steps if inputs else 0)

    @property
    def unfitted(self) -> bool:
        """Whether a refit is asked for, and tokens are too few for it."""
        return self.state.method.recovery.fits and not self.recovery.fits

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Copies of the expert's tensors, by the names of a feed-forward on its own; each is made when it is read."""
        return Copies(self.mixture.tensors(self.expert))

    def criterion(self) -> Criterion:
        """Return the criterion of channels; of an expert with next to no tokens, one that reads weights alone."""
        if self.tokens < MIN_TOKENS:
            return all_criteria()["l2"]
        # No backward pass is made through experts: where one is asked for, the default takes over.
        named = self.state.method.criteria.of_kind("channels")
        return named if named.from_gradients is None else all_criteria()["surgeon"]

    def collect(self, keep: tuple[int, ...] | None = None) -> Sums:
        """Run the expert up to its output projection on its tokens, and sum over the rows.

        The first time, sums are over all channels: units that are given and units that are chosen make one result.
        """
        tokens = self._batch
        self._at, rows = self.mixture.gated(self.expert, tokens.x_nd, self._routes)
        rows = tokens.scaled(rows, self._at)
        channels = keep
        if self._target_md is None:
            channels = None
            self._target_md = self._residual_nd[self._at] + rows @ self.norm.scale(self.weight)
        entries = torch.tensor(range(self.module.units) if channels is None else channels, device=rows.device)
        self._rows_mk = rows if len(entries) == rows.shape[1] else rows[:, entries]
        fitted = self._summed(tokens.weight_n)
        if keep is not None:
            return Sums(entries, fitted, fitted)
        # Rows may choose that nothing is fitted to.
        scored = fitted if self.state.rows.scores is None else self._summed(tokens.score_n)
        return Sums(entries, fitted, scored, self._source() if self.criterion().input_moments else None)

    def _summed(self, weight_n: Tensor) -> Moments:
        """Return the moments of the rows with their target."""
        moments = Moments(self._rows_mk.shape[1], self.stream.width, device=self.stream.device)
        moments.update(self._rows_mk, self._target_md, 1.0, weight_n[self._at])
        moments.reduce(self.stream.processes, self.owner)
        return moments

    def _source(self) -> Moments:
        """Return the moments of the expert's own input."""
        moments = Moments(self.stream.width, device=self.stream.device)
        read = self.mixture.read(self.expert, self._batch.x_nd[self._at])
        moments.update(read, weights_n=self._batch.score_n[self._at])
        moments.reduce(self.stream.processes, self.owner)
        return moments

    @contextmanager
    def linearised(
        self, sums: Sums, kept: Tensor, fit: OutputFit, add: AddPart
    ) -> Iterator[Callable[[], Iterator[Part]]]:
        """Linearise the expert on its tokens: one part."""
        tokens, at, x = self._batch, self._at, self._batch.x_nd[self._at]
        root = tokens.weight_n[at].sqrt()[:, None]
        factor = tokens.scaled(root * self._routes.of(self.expert)[1][:, None], at)
        # Float32: sums over tokens would be rounded otherwise by two processes than by one.
        slopes = self.mixture.slopes(self.expert, x)
        part = Part(self.mixture.read(self.expert, x), [slope[:, kept] * factor for slope in slopes])
        add(part, self._left(sums, kept, fit.weight_ko) * root, root)
        yield lambda: iter([part])

    def _left(self, sums: Sums, kept: Tensor, weight_kd: Tensor) -> Tensor:
        """Return what the target lacks at a weight of the kept channels (m x d)."""
        assert self._target_md is not None
        rows = self._rows_mk if len(kept) == len(sums.entries) else self._rows_mk[:, sums.among(kept)]
        return self._target_md - rows @ weight_kd

    def change(self, tensors: dict[str, Tensor]) -> None:
        """Let the expert compute with new input projections."""
        self.mixture.put(self.expert, {name: value.to(self.state.dtype) for name, value in tensors.items()})

    def store(self, fitted: Fitted) -> None:
        """Put the fitted output projection in place, zero for channels that go, and update the mixture's residual."""
        weight = self.norm.unscale(fitted.fit.weight_ko).to(self.state.dtype).float()
        full = weight.new_zeros(self.module.units, self.stream.width)
        full[fitted.kept] = weight
        left = self._left(fitted.sums, fitted.kept, self.norm.scale(weight))
        self._residual_nd[self._at] = left
        if self.shared:
            self.state.change({self.mixture.shared_name: full.T.contiguous()})
        else:
            self.mixture.put(self.expert, {"down_proj.weight": full.T})
