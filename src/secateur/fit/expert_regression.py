"""Rows of one expert: its gate times its inputs, on the tokens routed to it, which are all in memory.

    residual_m = target_m - sum of the outputs of the other experts        target of this expert
    ridge_e    = ridge * (1 + channels / tokens)                           higher if few tokens are routed to it

The shared expert is fitted in the same way, on all tokens; its input projections stay as they are.

Shapes: n tokens, m of them routed to an expert, f channels of an expert, k of them kept, d residual width.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.base.processes import Processes
from secateur.criteria.registry import Criterion, all_criteria
from secateur.criteria.statistics import module_seed
from secateur.fit.block_state import BlockState
from secateur.fit.input_projections import TangentRows
from secateur.fit.module import FittedModule
from secateur.fit.output_projection import OutputFit
from secateur.fit.recoveries.none import NoRecovery
from secateur.fit.regression import AddRows, ModuleMoments, Regression
from secateur.model.axes import FEED_FORWARD
from secateur.model.mixture import Mixture, Routes
from secateur.model.post_norm import PostNorm
from secateur.numerics.moments import Moments

MIN_TOKENS, MIN_TOKENS_FOR_INPUTS = 8, 64
"""Smallest numbers of tokens with which an expert's output projection is refitted, and with which its input projections
are."""


@dataclass(frozen=True)
class MixtureTokens:
    """Tokens of this process at a mixture."""

    x_nd: Tensor
    """Inputs of the mixture."""
    target_nd: Tensor
    """Target of the whole mixture, in error units."""
    weight_n: Tensor
    """Token weights in fits."""
    choice_weight_n: Tensor
    """Token weights in the choice of units."""
    scale_n: Tensor | None
    """Factor on each token's output; None unless a norm follows the mixture."""
    batches: Sequence[int]
    """Number of tokens in each batch."""
    norm: PostNorm
    processes: Processes

    def to_error_units(self, y_md: Tensor, some: Tensor | None = None) -> Tensor:
        """Return outputs for some tokens (m), or for all tokens, in error units."""
        return self.scaled(self.norm.scale(y_md), some)

    def scaled(self, values: Tensor, some: Tensor | None = None) -> Tensor:
        """Return rows of some tokens (m), or of all tokens, times the scale of these tokens."""
        if self.scale_n is None:
            return values
        return values * (self.scale_n if some is None else self.scale_n[some])[:, None]

    def by_batch(self, values: Tensor) -> Sequence[Tensor]:
        """Return the rows of each batch."""
        return values.split(list(self.batches))

    def count(self, some: Tensor) -> int:
        """Return how many of some tokens have a weight in the fit, in all processes."""
        return int(self.processes.total([float(self.weight_n[some].count_nonzero())]))

    def sample(self, most: int) -> "MixtureTokens":
        """Return about `most` of the tokens of all processes by which units are chosen, the same at every rank."""
        weighted = [part.nonzero()[:, 0] for part in self.by_batch(self.choice_weight_n)]
        stride = max(1, int(self.processes.total(map(len, weighted))) // most)
        starts = itertools.accumulate(self.batches, initial=0)
        some = torch.cat([start + part[::stride] for start, part in zip(starts, weighted, strict=False)])
        scale_n = torch.ones_like(self.weight_n) if self.scale_n is None else self.scale_n
        columns = torch.stack([self.weight_n, self.choice_weight_n, scale_n], 1)
        every = self.processes.gather(torch.cat([self.x_nd[some], self.target_nd[some], columns[some]], 1))
        x_nd, target_nd, columns = every.split([self.x_nd.shape[1], self.target_nd.shape[1], 3], 1)
        weight_n, choice_weight_n, scale_n = columns.unbind(1)
        scale = None if self.scale_n is None else scale_n
        return MixtureTokens(x_nd, target_nd, weight_n, choice_weight_n, scale, [len(every)], self.norm, self.processes)


class Float32Copies(Mapping[str, Tensor]):
    """Tensors by name, each copied to float32 when it is read."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].to(torch.float32, copy=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class ExpertRegression(Regression):
    """Regression of one expert of a mixture.

    Attributes:
        expert: Number of the expert; the shared expert comes after all others.
        is_shared: Whether this is the shared expert.
        has_too_few_tokens: Whether the run refits weights, but this expert has too few tokens for it.
    """

    fits_bias = False

    def __init__(
        self,
        state: BlockState,
        mixture: Mixture,
        tokens: MixtureTokens,
        routes: Routes,
        residual_nd: Tensor,
        expert: int,
    ):
        """Start with the expert's old weights.

        Args:
            state: The block.
            mixture: The mixture, which computes with the weights fitted so far.
            tokens: Tokens at the mixture.
            routes: Routes of the tokens to the experts that are kept.
            residual_nd: Target minus output of the mixture; `store` updates it in place.
            expert: Number of the expert.
        """
        self.state, self.mixture, self.expert, self.stream = state, mixture, expert, state.stream
        self.norm, self._batch, self._routes, self._residual_nd = tokens.norm, tokens, routes, residual_nd
        self.module = mixture.feed_forward(expert)
        self.is_shared = expert == mixture.module.units
        self.tokens = tokens.count(mixture.tokens(expert, routes))
        # Few tokens say little: the penalty grows, and below some number the weights stay.
        recovery, is_enough = state.method.recovery, self.tokens >= MIN_TOKENS
        ridge = recovery.ridge * (1 + self.module.units / max(self.tokens, 1))
        self.recovery = replace(recovery, ridge=ridge) if is_enough else NoRecovery(ridge)
        self.has_too_few_tokens = recovery.fits and not is_enough
        self.fits_inputs = not self.is_shared and self.tokens >= MIN_TOKENS_FOR_INPUTS
        f, d = self.module.units, self.stream.width
        self.owner = self.stream.processes.assign_owner(f**2 * (f + 2 * d))
        self.seed = module_seed(state.method.seed, state.index, FEED_FORWARD) + expert
        self._target_md: Tensor | None = None
        """Target of this expert, once its first outputs are known."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Tensors of the expert, by the names of an ordinary feed-forward."""
        return Float32Copies(self.mixture.tensors(self.expert))

    def criterion(self) -> Criterion:
        """Return the criterion of the expert's channels."""
        if self.tokens < MIN_TOKENS:
            # l2 reads weights alone.
            return all_criteria()["l2"]
        # No backward pass runs through experts: the default replaces a criterion that needs one.
        criterion = self.state.method.criteria.of_kind("channels")
        return criterion if criterion.from_gradients is None else all_criteria()["surgeon"]

    def collect(self, keep: tuple[int, ...] | None = None) -> ModuleMoments:
        """Run the expert on its tokens up to its output projection, and return the moments of the rows.

        The first call is always over all channels, so that given and chosen units lead to the same result.
        """
        tokens, channels = self._batch, keep
        self._at, rows_mf = self.mixture.gated_input(self.expert, tokens.x_nd, self._routes)
        rows_mf = tokens.scaled(rows_mf, self._at)
        if self._target_md is None:
            channels = None
            self._target_md = self._residual_nd[self._at] + self._times(rows_mf, self.norm.scale(self.weight))
        entries = torch.tensor(range(self.module.units) if channels is None else channels, device=rows_mf.device)
        self._rows = rows_mf if len(entries) == rows_mf.shape[1] else rows_mf[:, entries]
        fit = self._moments(tokens.weight_n)
        if keep is not None:
            return ModuleMoments(entries, fit, fit)
        choice = fit if self.state.rows.choice_weights is None else self._moments(tokens.choice_weight_n)
        return ModuleMoments(entries, fit, choice, self._input_moments() if self.criterion().input_moments else None)

    def _moments(self, weight_n: Tensor) -> Moments:
        """Return the moments of the rows and their target, with some token weights."""
        assert self._target_md is not None
        moments = Moments(self._rows.shape[1], self.stream.width, device=self.stream.device)
        for rows, target, weights in zip(
            *map(self._by_batch, (self._rows, self._target_md, weight_n[self._at])), strict=True
        ):
            moments.update(rows, target, weights_n=weights)
        moments.reduce(self.stream.processes, self.owner)
        return moments

    def _input_moments(self) -> Moments:
        """Return the moments of the expert's own input."""
        moments = Moments(self.stream.width, device=self.stream.device)
        weights_m = self._batch.choice_weight_n[self._at]
        for x, weights in zip(*map(self._by_batch, (self._batch.x_nd[self._at], weights_m)), strict=True):
            moments.update(self.mixture.expert_input(self.expert, x), weights_n=weights)
        moments.reduce(self.stream.processes, self.owner)
        return moments

    @contextmanager
    def linearised(
        self, moments: ModuleMoments, kept: Tensor, output: OutputFit, add: AddRows
    ) -> Iterator[Callable[[], Iterator[TangentRows]]]:
        """Linearise the expert on its tokens, in one part for each batch."""
        tokens, at, parts = self._batch, self._at, list[TangentRows]()
        root_m1 = tokens.weight_n[at].sqrt()[:, None]
        scale_m1 = tokens.scaled(root_m1 * self._routes.of(self.expert)[1][:, None], at)
        residual_md = self._residual(moments, kept, output.weight_kd) * root_m1
        for x, scale, residual, root in zip(
            *map(self._by_batch, (tokens.x_nd[at], scale_m1, residual_md, root_m1)), strict=True
        ):
            factors = [slope[:, kept] * scale for slope in self.mixture.slopes(self.expert, x)]
            parts.append(TangentRows(self.mixture.expert_input(self.expert, x), factors))
            add(parts[-1], residual, root)
        yield lambda: iter(parts)

    def _residual(self, moments: ModuleMoments, kept: Tensor, weight_kd: Tensor) -> Tensor:
        """Return target minus output, with a weight of the kept channels (m x d)."""
        assert self._target_md is not None
        rows_mk = self._rows if len(kept) == len(moments.entries) else self._rows[:, moments.positions(kept)]
        return self._target_md - self._times(rows_mk, weight_kd)

    def _times(self, rows_mf: Tensor, weight_fd: Tensor) -> Tensor:
        """Return the product of each batch's rows with a weight (m x d)."""
        return torch.cat([rows @ weight_fd for rows in self._by_batch(rows_mf)])

    def _by_batch(self, values: Tensor) -> Sequence[Tensor]:
        """Return the rows of each batch."""
        return values.split(self.mixture.counts(self._at))

    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Let the expert compute with new input projections."""
        self.mixture.set_tensors(self.expert, {name: value.to(self.state.dtype) for name, value in tensors.items()})

    def store(self, fitted: FittedModule) -> None:
        """Put the output projection in place, with zeros for removed channels, and update the mixture's residual."""
        weight = self.norm.unscale(fitted.output.weight_kd).to(self.state.dtype).float()
        full_fd = weight.new_zeros(self.module.units, self.stream.width)
        full_fd[fitted.kept_inputs] = weight
        residual = self._residual(fitted.moments, fitted.kept_inputs, self.norm.scale(weight))
        self._residual_nd[self._at] = residual
        if self.is_shared:
            self.state.set_tensors({self.mixture.shared_name: full_fd.T.contiguous()})
        else:
            self.mixture.set_tensors(self.expert, {"down_proj.weight": full_fd.T})
