"""Stage of a mixture of experts: many modules, each with a gate per token, whose outputs add up.

    y_n = sum_e gate_ne * expert_e(x_n) + shared expert(x_n)

1. Choose the experts that are kept; the model's own router then sends every token to experts among them.
2. Fit the shared expert first, then each kept expert, to what the output still lacks of the target (block coordinate
   descent on the joint least squares).

Shapes: n tokens, d residual width.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.criteria.experts import MAX_TOKENS, expert_order
from secateur.criteria.routed_tokens import RoutedTokens
from secateur.criteria.statistics import module_seed
from secateur.fit.block_state import BlockState
from secateur.fit.expert_regression import ExpertRegression, MixtureBatch
from secateur.fit.module import fit_module
from secateur.fit.target import ModuleTarget
from secateur.model.arena import Activations
from secateur.model.axes import Width
from secateur.model.mixture import Mixture
from secateur.model.structure import KeptUnits, PrunableModule
from secateur.model.surgery import channels_by_expert
from secateur.model.units.channels import CHANNELS
from secateur.model.units.experts import EXPERT_CHANNELS, EXPERTS


class MixtureStage:
    """Stage of the experts of a mixture."""

    def __init__(self, state: BlockState, module: PrunableModule, pruned: Activations):
        self.state, self.module, self.stream, self.recovery = state, module, state.stream, state.method.recovery
        self.target = ModuleTarget(state, module, pruned)
        self.mixture = Mixture(state.stream, state.layer, module)
        self.batches = list(self._collect(pruned))

    def prune(self, width: Width, kept: KeptUnits) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
        """Choose experts and their channels, refit and store the outputs, as `secateur.fit.block.prune_stage` says."""
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
            if not bool(torch.isfinite(x.sum() + target.sum())):
                raise SecateurError(
                    f"block {self.state.index}: the activations of the experts are NaN or infinite; check the weights"
                )
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
            fitted = fit_module(regression, CHANNELS, stop, kept)
            regression.store(fitted)
            channels[expert] = fitted.keep
        return unfitted

    def _store_outputs(self, alive: Tensor) -> None:
        """Store the mixture's outputs in the pruned stream."""
        state = self.state
        output = state.outputs[self.module.kind] = state.arena.empty(state.rows, self.stream.width)
        for at, batch in zip(state.rows.batches(), self.batches, strict=True):
            output[at] = self.mixture.output(batch.x_nd[None], alive)[0]
