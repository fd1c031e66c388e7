"""Rows of one expert: its gate times its inputs, on the tokens routed to it, which are all in memory.

    residual_m = target_m - sum of the outputs of the other experts        target of this expert
    ridge_e    = ridge * (1 + channels / tokens)                           higher if few tokens are routed to it

The shared expert is fitted in the same way, on all tokens; its input projections stay as they are.

Shapes: n tokens, m of them routed to an expert, f channels of an expert, k of them kept, d residual width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from secateur.criteria.registry import Criterion, all_criteria
from secateur.criteria.statistics import module_seed
from secateur.fit.block_state import BlockState
from secateur.fit.input_projections import TangentRows
from secateur.fit.module import FittedModule
from secateur.fit.output_projection import OutputFit
from secateur.fit.recoveries import NoRecovery
from secateur.fit.regression import AddRows, ModuleMoments, Regression
from secateur.model.axes import FEED_FORWARD
from secateur.model.mixture import Mixture, Routes
from secateur.model.post_norm import PostNorm
from secateur.model.surgery import stored_weight
from secateur.numerics.moments import Moments

MIN_TOKENS, MIN_TOKENS_FOR_INPUTS = 8, 64
"""Smallest numbers of tokens with which an expert's output projection is refitted, and with which its input projections
are."""


@dataclass
class MixtureBatch:
    """Tokens of one batch at a mixture. Each batch takes products of its own, whose rounding depends on their rows."""

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
    norm: PostNorm
    routes: Routes = field(init=False)
    """Routes of the tokens to the experts that are kept."""
    residual_nd: Tensor = field(init=False)
    """Target minus output of the mixture, as it is fitted so far."""

    def to_error_units(self, y_md: Tensor, some: Tensor | None = None) -> Tensor:
        """Return outputs for some tokens (m), or for all tokens, in error units."""
        return self.scaled(self.norm.scale(y_md), some)

    def scaled(self, values: Tensor, some: Tensor | None = None) -> Tensor:
        """Return rows of some tokens (m), or of all tokens, times the scale of these tokens."""
        if self.scale_n is None:
            return values
        return values * (self.scale_n if some is None else self.scale_n[some])[:, None]


class ExpertRegression(Regression):
    """Regression of one expert of a mixture.

    Attributes:
        expert: Number of the expert; the shared expert comes after all others.
        is_shared: Whether this is the shared expert.
        has_too_few_tokens: Whether the run refits weights, but this expert has too few tokens for it.
    """

    fits_bias = False

    def __init__(
        self, state: BlockState, mixture: Mixture, batches: Sequence[MixtureBatch], norm: PostNorm, expert: int
    ):
        """Start with the expert's old weights.

        Args:
            state: The block.
            mixture: The mixture, which computes with the weights fitted so far.
            batches: Tokens at the mixture; `store` updates what the output lacks of the target.
            norm: Norm after the mixture.
            expert: Number of the expert.
        """
        self.state, self.mixture, self.expert, self.stream, self.norm = state, mixture, expert, state.stream, norm
        self.module, self.is_shared = mixture[expert].module, expert == mixture.module.units
        self._routed = [(batch, *mixture.routed(expert, batch.x_nd, batch.routes)) for batch in batches]
        """Each batch, with the tokens routed to the expert and their gates (m; m)."""
        counts = (float(batch.weight_n[at].count_nonzero()) for batch, at, _ in self._routed)
        self.tokens = int(self.stream.processes.total(counts))
        # Few tokens say little: the penalty grows, and below some number the weights stay.
        recovery, is_enough = state.method.recovery, self.tokens >= MIN_TOKENS
        ridge = recovery.ridge * (1 + self.module.units / max(self.tokens, 1))
        self.recovery = replace(recovery, ridge=ridge) if is_enough else NoRecovery(ridge)
        self.has_too_few_tokens = recovery.fits and not is_enough
        self.fits_inputs = not self.is_shared and self.tokens >= MIN_TOKENS_FOR_INPUTS
        f, d = self.module.units, self.stream.width
        self.owner = self.stream.processes.assign_owner(f**2 * (f + 2 * d))
        self.seed = module_seed(state.method.seed, state.index, FEED_FORWARD) + expert
        self._rows: list[Tensor] = []
        """Inputs of the output projection times gate and scale, by batch (m x f)."""
        self._targets: list[Tensor] | None = None
        """Target of this expert, once its first outputs are known, by batch (m x d)."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Tensors of the expert."""
        return self.mixture[self.expert]

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
        # Free the rows before they are computed anew.
        channels, self._rows = keep, []
        for batch, at, gates in self._routed:
            rows = self.mixture.projection_input(self.expert, batch.x_nd[at]) * gates[:, None]
            self._rows.append(batch.scaled(rows, at))
        if self._targets is None:
            channels, weight = None, self.norm.scale(self.weight)
            rests = (batch.residual_nd[at] for batch, at, _ in self._routed)
            self._targets = [rest + rows @ weight for rest, rows in zip(rests, self._rows, strict=True)]
        entries = torch.tensor(range(self.module.units) if channels is None else channels, device=self.stream.device)
        if len(entries) < self.module.units:
            self._rows = [rows[:, entries] for rows in self._rows]
        fit = self._moments(len(entries), lambda batch: batch.weight_n)
        if keep is not None:
            return ModuleMoments(entries, fit, fit)
        is_separate, asks_input = self.state.rows.choice_weights is not None, self.criterion().input_moments
        choice = self._moments(len(entries), lambda batch: batch.choice_weight_n) if is_separate else fit
        return ModuleMoments(entries, fit, choice, self._input_moments() if asks_input else None)

    def _moments(self, inputs: int, weights_of: Callable[[MixtureBatch], Tensor]) -> Moments:
        """Return the moments of the rows and their target, with some token weights."""
        assert self._targets is not None
        moments = Moments(inputs, self.stream.width, device=self.stream.device)
        for (batch, at, _), rows, target in zip(self._routed, self._rows, self._targets, strict=True):
            moments.update(rows, target, weights_n=weights_of(batch)[at])
        moments.reduce(self.stream.processes, self.owner)
        return moments

    def _input_moments(self) -> Moments:
        """Return the moments of the expert's own input."""
        moments = Moments(self.stream.width, device=self.stream.device)
        for batch, at, _ in self._routed:
            x = self.mixture.expert_input(self.expert, batch.x_nd[at])
            moments.update(x, weights_n=batch.choice_weight_n[at])
        moments.reduce(self.stream.processes, self.owner)
        return moments

    @contextmanager
    def linearised(
        self, moments: ModuleMoments, kept: Tensor, output: OutputFit, add: AddRows
    ) -> Iterator[Callable[[], Iterator[TangentRows]]]:
        """Linearise the expert on its tokens, in one part for each batch."""
        parts, residuals = list[TangentRows](), self._residuals(moments, kept, output.weight_kd)
        for (batch, at, gates), residual in zip(self._routed, residuals, strict=True):
            root = batch.weight_n[at].sqrt()[:, None]
            scale = batch.scaled(root * gates[:, None], at)
            x = self.mixture.expert_input(self.expert, batch.x_nd[at])
            slopes = self.mixture[self.expert].slopes(x)
            parts.append(TangentRows(x, [slope[:, kept] * scale for slope in slopes]))
            add(parts[-1], residual * root, root)
        yield lambda: iter(parts)

    def _residuals(self, moments: ModuleMoments, kept: Tensor, weight_kd: Tensor) -> Iterator[Tensor]:
        """Yield target minus output of each batch, with a weight of the kept channels (m x d)."""
        assert self._targets is not None
        for rows, target in zip(self._rows, self._targets, strict=True):
            own = rows if len(kept) == len(moments.entries) else rows[:, moments.positions(kept)]
            yield target - own @ weight_kd

    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Let the expert compute with new tensors."""
        module, shared = self.mixture.module, self.mixture.names.shared_expert
        for name, tensor in tensors.items():
            if self.is_shared:
                self.state.set_tensors({f"{module.path}.{shared}.{name}": tensor})
            else:
                path = f"{module.output_projection.layer}.{name.removesuffix('.weight')}"
                self.state.changeable(path).write(self.expert, tensor)

    def store(self, fitted: FittedModule) -> None:
        """Put the output projection in place, with zeros for removed channels, and update the mixture's residual."""
        weight = self.norm.unscale(fitted.output.weight_kd).to(self.state.dtype).float()
        full_fd = weight.new_zeros(self.module.units, self.stream.width)
        full_fd[fitted.kept_inputs] = weight
        residuals = self._residuals(fitted.moments, fitted.kept_inputs, self.norm.scale(weight))
        for (batch, at, _), residual in zip(self._routed, residuals, strict=True):
            batch.residual_nd[at] = residual
        self.set_tensors({self.module.output_projection.name: stored_weight(self.module, full_fd)})
