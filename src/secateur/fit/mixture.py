"""Fit of a mixture of experts: many modules, each with a gate per token, whose outputs add up.

    y_n        = sum_e gate_ne * expert_e(x_n) + shared expert(x_n)
    residual_m = target_m - sum of the outputs of the other experts        target of one expert
    ridge_e    = ridge * (1 + channels / tokens)                           higher if few tokens are routed to it

1. Choose the experts that are kept; the model's own router then sends every token to experts among them.
2. Fit the shared expert first, then each kept expert, to what the output still lacks of the target (block coordinate
   descent on the joint least squares).

The rows of an expert are its gate times its inputs, on the tokens routed to it. They are all in memory. The shared
expert is fitted in the same way, on all tokens; its input projections stay as they are.

Shapes: n tokens, m of them routed to an expert, f channels of an expert, k of them kept, d residual width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from secateur.criteria.experts import MAX_TOKENS, expert_order
from secateur.criteria.registry import Criterion, all_criteria
from secateur.criteria.routed_tokens import RoutedTokens
from secateur.criteria.statistics import module_seed
from secateur.fit.block_state import BlockState
from secateur.fit.input_projections import TangentRows
from secateur.fit.module import ModuleFit
from secateur.fit.output_projection import OutputFit
from secateur.fit.recoveries import NoRecovery
from secateur.fit.regression import AddRows, BatchRows, FittedModule, ModuleMoments, Regression
from secateur.fit.target import ModuleTarget
from secateur.model.arena import Activations
from secateur.model.axes import Width
from secateur.model.mixture import Mixture, Routes
from secateur.model.post_norm import PostNorm
from secateur.model.structure import KeptUnits, PrunableModule
from secateur.model.surgery import channels_by_expert, output_tensor
from secateur.model.units.channels import CHANNELS
from secateur.model.units.experts import EXPERT_CHANNELS, EXPERTS

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
        super().__init__(state, mixture[expert].module, norm)
        self.mixture, self.expert, self.is_shared = mixture, expert, expert == mixture.module.units
        self.seed += expert
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
        return super().collect(None if self._targets is None else keep)

    def rows(self, entries: Tensor, with_module_input: bool) -> Iterator[BatchRows]:
        """Run the expert on its tokens up to its output projection, keep the rows, and yield them."""
        # The old weights are read only where the targets are still to be computed.
        weight = self.norm.scale(self.weight) if self._targets is None else None
        self._targets = targets = self._targets or []
        # Free the rows before they are computed anew.
        self._rows = []
        for number, (batch, at, gates) in enumerate(self._routed):
            x = batch.x_nd[at]
            rows = batch.scaled(self.mixture.projection_input(self.expert, x) * gates[:, None], at)
            if weight is not None:
                targets.append(batch.residual_nd[at] + rows @ weight)
            self._rows.append(rows if len(entries) == rows.shape[1] else rows[:, entries])
            choice_weights = 1.0, batch.choice_weight_n[at]
            inputs = (self.mixture.expert_input(self.expert, x), choice_weights) if with_module_input else None
            weights = 1.0, batch.weight_n[at]
            yield BatchRows(self._rows[-1], targets[number], weights, choice_weights, inputs)

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
        self.set_tensors({self.module.output_projection.name: output_tensor(self.module, full_fd)})


class MixtureFit:
    """Fit of the experts of a mixture while it is made."""

    def __init__(self, state: BlockState, module: PrunableModule, pruned: Activations):
        self.state, self.module, self.stream, self.recovery = state, module, state.stream, state.method.recovery
        self.target = ModuleTarget(state, module, pruned)
        self.mixture = Mixture(state.stream, state.layer, module)
        self.batches = list(self._collect(pruned))

    def run(self, width: Width, kept: KeptUnits) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
        """Choose experts and their channels, refit them, and store the outputs in the pruned stream.

        Args:
            width: Number of units that are kept along each axis.
            kept: Units that are kept, by kind, if they are chosen already.

        Returns:
            The units that are kept, by kind, and the experts with too few tokens for a refit.
        """
        module = self.module
        keep = kept[module.kind] if module.kind in kept else self._choose_experts(width[EXPERTS])
        alive, cut = torch.tensor(keep, device=self.stream.device), width[EXPERT_CHANNELS] < module.units_inside
        channels, unfitted = self._channels_by_expert(keep, kept.get("channels", ()) if cut else ()), list[int]()
        with self.stream.rounded_sums():
            if self.recovery.fits or cut:
                for batch in self.batches:
                    output_nd = self.mixture.output(batch.x_nd[None], alive)[0]
                    batch.residual_nd = batch.target_nd - batch.to_error_units(output_nd)
                unfitted = self._fit_experts(alive, width[EXPERT_CHANNELS], channels)
        self._store_outputs(alive)
        units: dict[str, tuple[int, ...]] = {module.kind: keep}
        if cut:
            experts = [*keep, *([module.units] if module.shared_multiple else [])]
            units["channels"] = tuple(
                expert * module.units_inside + channel for expert in experts for channel in channels[expert]
            )
        return units, tuple(unfitted)

    def _collect(self, pruned: Activations) -> Iterator[MixtureBatch]:
        """Run the pruned stream up to the mixture, and yield all tokens with their target.

        Raises:
            SecateurError: Activations are NaN or infinite.
        """
        layer = self.module.input_layer
        for at in self.state.rows.batches():
            x = self.state.layer_inputs(self.module, pruned, at, layer)[layer].reshape(-1, self.stream.width)
            target, scale_n1, weights = self.target.of(at)
            self.state.check_activations(bool(torch.isfinite(x.sum() + target.sum())), "experts")
            weights = target.new_ones(len(x)) if weights is None else weights
            scale_n = None if scale_n1 is None else scale_n1[:, 0]
            yield MixtureBatch(x, target, at.weight * weights, at.choice_weight * weights, scale_n, self.target.norm)

    def _sample(self) -> MixtureBatch:
        """Return about `MAX_TOKENS` tokens of all processes by which units are chosen, the same at every rank."""
        processes, width, norm = self.stream.processes, self.stream.width, self.target.norm
        weighted = [batch.choice_weight_n.nonzero()[:, 0] for batch in self.batches]
        stride = max(1, int(processes.total(map(len, weighted))) // MAX_TOKENS)
        # One of several processes may have no tokens.
        parts = [torch.empty(0, 2 * width + 3, device=self.stream.device)]
        for batch, tokens in zip(self.batches, weighted, strict=True):
            scale_n = torch.ones_like(batch.weight_n) if batch.scale_n is None else batch.scale_n
            columns = torch.stack([batch.weight_n, batch.choice_weight_n, scale_n], 1)
            some = tokens[::stride]
            parts.append(torch.cat([batch.x_nd[some], batch.target_nd[some], columns[some]], 1))
        x_nd, target_nd, columns = processes.gather(torch.cat(parts)).split([width, width, 3], 1)
        weight_n, choice_weight_n, scale_n = columns.unbind(1)
        return MixtureBatch(x_nd, target_nd, weight_n, choice_weight_n, None if norm.norm is None else scale_n, norm)

    def _choose_experts(self, number: int) -> tuple[int, ...]:
        """Return the experts that the criterion keeps."""
        if number == self.module.units:
            return tuple(range(number))
        method, sample = self.state.method, self._sample()
        seed = module_seed(method.seed, self.state.index, self.module.role)

        def order() -> dict[str, Tensor]:
            weights = sample.choice_weight_n
            routed = RoutedTokens(self.mixture, sample.x_nd, sample.target_nd, weights, sample.to_error_units)
            return {"order": torch.tensor(expert_order(method.criteria.choice.experts, routed, number, seed).order)}

        removed = self.stream.processes.compute_at(0, order, torch.device("cpu"))["order"]
        return tuple(sorted(set(range(self.module.units)) - set(removed.tolist())))

    def _channels_by_expert(self, keep: tuple[int, ...], channels: Sequence[int]) -> dict[int, tuple[int, ...]]:
        """Return channels by the expert that has them, numbered inside it; without channels, an empty mapping."""
        if not channels:
            return {}
        routed, shared = channels_by_expert(self.module, len(keep), channels)
        by_expert = (*zip(keep, routed.tolist(), strict=True), (self.module.units, shared.tolist()))
        return {expert: tuple(inside) for expert, inside in by_expert}

    def _fit_experts(self, alive: Tensor, width: int, channels: dict[int, tuple[int, ...]]) -> list[int]:
        """Fit one expert after the other to what the mixture's output still lacks of the target.

        Args:
            alive: Experts that are kept.
            width: Number of channels that each expert keeps.
            channels: Channels that each expert keeps, if they are given; chosen channels are added.

        Returns:
            Experts with too few tokens for a refit.
        """
        state, mixture, module, unfitted = self.state, self.mixture, self.module, list[int]()
        # All fits change the same tensors in the same order, whichever experts have tokens.
        for leaf in ("down_proj", *(["gate_up_proj"] if self.recovery.input_steps else [])):
            state.changeable(f"{module.output_projection.layer}.{leaf}")
        for batch in self.batches:
            batch.routes = mixture.route(batch.x_nd, alive)
        for expert in mixture.with_shared(alive):
            regression = ExpertRegression(state, mixture, self.batches, self.target.norm, expert)
            full = regression.module.units
            stop = width * (module.shared_multiple if regression.is_shared else 1) or full
            unfitted += [expert] if regression.has_too_few_tokens and not regression.is_shared else []
            if not regression.recovery.fits and stop == full:
                continue
            kept = tuple(range(full)) if stop == full else channels.get(expert)
            fitted = ModuleFit(regression).run(CHANNELS, stop, kept)
            regression.store(fitted)
            channels[expert] = fitted.keep
        return unfitted

    def _store_outputs(self, alive: Tensor) -> None:
        """Store the mixture's outputs in the pruned stream."""
        state = self.state
        output = state.outputs[self.module.kind] = state.arena.empty(state.rows, self.stream.width)
        for at, batch in zip(state.rows.batches(), self.batches, strict=True):
            output[at] = self.mixture.output(batch.x_nd[None], alive)[0]
