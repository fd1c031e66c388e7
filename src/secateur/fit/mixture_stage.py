"""Stage of a mixture of experts: many modules, each with a gate per token, whose outputs add up.

    y_n = sum_e gate_ne * expert_e(x_n) + shared expert(x_n)

1. Choose the experts that are kept; the model's own router then sends every token to experts among them.
2. Fit the shared expert first, then each kept expert, to what the output still lacks of the target (block coordinate
   descent on the joint least squares).

Shapes: n tokens, d residual width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.criteria.experts import MAX_TOKENS, expert_order
from secateur.criteria.routed_tokens import RoutedTokens
from secateur.criteria.statistics import module_seed
from secateur.fit.block_state import BlockState
from secateur.fit.expert_regression import ExpertRegression, MixtureTokens
from secateur.fit.module import fit_module
from secateur.fit.target import ModuleTarget
from secateur.model.arena import Activations
from secateur.model.axes import Width
from secateur.model.expert_matrices import changeable
from secateur.model.mixture import Mixture, Routes
from secateur.model.structure import KeptUnits, PrunableModule
from secateur.model.surgery import channels_by_expert
from secateur.model.units.channels import CHANNELS
from secateur.model.units.experts import EXPERT_CHANNELS, EXPERTS


class MixtureStage:
    """Stage of the experts of a mixture."""

    def __init__(self, state: BlockState, module: PrunableModule, pruned: Activations):
        self.state, self.module, self.stream, self.recovery = state, module, state.stream, state.method.recovery
        self.target = ModuleTarget(state, module, pruned)
        # One of several processes may have no tokens.
        batches = [0, *(state.rows.ids(at).numel() for at in state.rows.batches())]
        self.mixture = Mixture(state.stream, state.layer, module, batches)
        self.tokens = self._collect(pruned)

    def prune(self, width: Width, kept: KeptUnits) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
        """Choose experts and their channels, refit and store the outputs, as `secateur.fit.stage.prune_stage` says."""
        tokens, module = self.tokens, self.module
        keep = kept[module.kind] if module.kind in kept else self._choose_experts(width[EXPERTS])
        alive, cut = torch.tensor(keep, device=self.stream.device), width[EXPERT_CHANNELS] < module.units_inside
        channels, unfitted = self._channels_by_expert(keep, kept.get("channels", ()) if cut else ()), list[int]()
        with self.stream.rounded_sums():
            if self.recovery.fits or cut:
                outputs = [self.mixture.output(x_nd[None], alive)[0] for x_nd in tokens.by_batch(tokens.x_nd)]
                residual = tokens.target_nd - tokens.to_error_units(torch.cat(outputs))
                unfitted = self._fit_experts(alive, residual, width[EXPERT_CHANNELS], channels)
        self._store_outputs(alive)
        units: dict[str, tuple[int, ...]] = {module.kind: keep}
        if cut:
            experts = [*keep, *([module.units] if module.shared_multiple else [])]
            units["channels"] = tuple(
                expert * module.units_inside + channel for expert in experts for channel in channels[expert]
            )
        return units, tuple(unfitted)

    def _collect(self, pruned: Activations) -> MixtureTokens:
        """Run the pruned stream up to the mixture, and return all tokens with their target.

        Raises:
            SecateurError: Activations are NaN or infinite.
        """
        width, layer = self.stream.width, self.module.input_layer
        none = torch.empty(0, width, device=self.stream.device)
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]] = [
            (none, none, none[:, 0], none[:, 0], none[:, :1])
        ]
        for at in self.state.rows.batches():
            x = self.state.layer_inputs(self.module, pruned, at, layer)[layer].reshape(-1, width)
            batch = self.target.of(at)
            weights = batch.target_nd.new_ones(len(x)) if batch.weights_n is None else batch.weights_n
            parts.append((x, batch.target_nd, at.weight * weights, at.choice_weight * weights, batch.scale_n1))
        xs, targets, fit_weights, choice_weights, scales = zip(*parts, strict=True)
        if not bool(torch.isfinite(torch.stack([part.sum() for part in (*xs, *targets)]).sum())):
            raise SecateurError(
                f"block {self.state.index}: the activations of the experts are NaN or infinite; check the weights"
            )
        return MixtureTokens(
            torch.cat(xs),
            torch.cat(targets),
            torch.cat(fit_weights),
            torch.cat(choice_weights),
            None if scales[-1] is None else torch.cat(scales)[:, 0],
            self.mixture.batches,
            self.target.norm,
            self.stream.processes,
        )

    def _choose_experts(self, number: int) -> tuple[int, ...]:
        """Return the experts that the criterion keeps."""
        if number == self.module.units:
            return tuple(range(number))
        method, sample = self.state.method, self.tokens.sample(MAX_TOKENS)
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

    def _fit_experts(
        self, alive: Tensor, residual_nd: Tensor, width: int, channels: dict[int, tuple[int, ...]]
    ) -> list[int]:
        """Fit one expert after the other to what the mixture's output still lacks of the target.

        Args:
            alive: Experts that are kept.
            residual_nd: Target minus output of the mixture; updated in place after each expert.
            width: Number of channels that each expert keeps.
            channels: Channels that each expert keeps, if they are given; chosen channels are added.

        Returns:
            Experts with too few tokens for a refit.
        """
        state, mixture, module, unfitted = self.state, self.mixture, self.module, list[int]()
        names = mixture.stored_names(inputs=self.recovery.input_steps > 0)
        for name in names:
            # Set to new values expert by expert. On a GPU this is a copy of all experts, made tensor by tensor.
            state.set_tensors({name: changeable(state.tensors[name], state.dtype, state.arena)})
        by_batch = [mixture.route(x_nd, alive) for x_nd in self.tokens.by_batch(self.tokens.x_nd)]
        routes = Routes(*map(torch.cat, zip(*by_batch, strict=True)))
        for expert in mixture.with_shared(alive):
            regression = ExpertRegression(state, mixture, self.tokens, routes, residual_nd, expert)
            full = regression.module.units
            stop = width * (module.shared_multiple if regression.is_shared else 1) or full
            unfitted += [expert] if regression.has_too_few_tokens and not regression.is_shared else []
            if not regression.recovery.fits and stop == full:
                continue
            kept = tuple(range(full)) if stop == full else channels.get(expert)
            fitted = fit_module(regression, CHANNELS, stop, kept)
            regression.store(fitted)
            channels[expert] = fitted.keep
        for name in names:
            state.set_tensors({name: state.tensors[name]})
        return unfitted

    def _store_outputs(self, alive: Tensor) -> None:
        """Store the mixture's outputs in the pruned stream."""
        state = self.state
        output = state.outputs[self.module.kind] = state.arena.empty(state.rows, self.stream.width)
        start = 0
        for at in state.rows.batches():
            count = state.rows.ids(at).numel()
            output[at] = self.mixture.output(self.tokens.x_nd[None, start : start + count], alive)[0]
            start += count
