"""Rows of an attention or a feed-forward, streamed through the block batch by batch.

The inputs of the output projection are stored until the module is done. The outputs after the refit then take one
product, and no forward pass.

Shapes: n tokens of a batch (b rows of t tokens), a inputs of the output projection, k kept inputs, d residual width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from secateur.base.device import fast_dtype
from secateur.base.errors import SecateurError
from secateur.checkpoints.facts import activation_of
from secateur.criteria.registry import Criterion
from secateur.criteria.statistics import module_seed
from secateur.fit.block_state import BlockState
from secateur.fit.input_projections import TangentRows, projection_outputs, tangent_factors
from secateur.fit.module import FittedModule
from secateur.fit.output_projection import OutputFit
from secateur.fit.regression import AddRows, ModuleMoments, Regression
from secateur.fit.target import ModuleTarget
from secateur.model.arena import Activations
from secateur.model.rows import Batch
from secateur.model.structure import PrunableModule
from secateur.model.surgery import kept_inputs
from secateur.numerics.moments import Moments


class BlockRegression(Regression):
    """Regression of an attention or a feed-forward in the pruned stream."""

    def __init__(self, state: BlockState, module: PrunableModule, pruned: Activations):
        self.state, self.module, self.pruned, self.stream = state, module, pruned, state.stream
        self.target = ModuleTarget(state, module, pruned)
        self.norm, self.fits_bias, self.recovery = self.target.norm, self.target.fits_bias, state.method.recovery
        self.fits_inputs = bool(module.channel_projections)
        inputs = module.units * module.size
        self.owner = self.stream.processes.assign_owner(inputs**2 * (inputs + 2 * self.stream.width))
        self.seed = module_seed(state.method.seed, state.index, module.role)
        self._fit_batches = [at for at in state.rows.batches() if at.weight]
        self.tokens = int(self.stream.processes.total(state.rows.ids(at).numel() for at in self._fit_batches))
        self._stored: Activations | None = None
        """Inputs of the output projection (b x t x a)."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Tensors of the block."""
        return self.state.tensors

    def criterion(self) -> Criterion:
        """Return the criterion of the module."""
        return self.state.method.criteria.of_module(self.state.index, self.module.kind)

    def collect(self, keep: tuple[int, ...] | None = None) -> ModuleMoments:
        """Run the pruned stream up to the output projection, store its inputs, and return their moments.

        Raises:
            SecateurError: Activations are NaN or infinite.
        """
        state, stream = self.state, self.stream
        self._release()
        units = tuple(range(self.module.units)) if keep is None else keep
        entries = kept_inputs(self.module, units).to(stream.device)
        self._stored = state.arena.empty(state.rows, len(entries), stream.products_dtype)
        moments = self._empty_moments(entries, for_choice=keep is None)
        for at in state.rows.batches():
            self._collect_batch(moments, at, self._stored, all_entries=keep is None)
        for part in dict.fromkeys((moments.fit, moments.choice, moments.module_input)):
            if part is not None:
                part.reduce(stream.processes, self.owner)
        if not (moments.fit.finite() and moments.choice.finite()):
            raise SecateurError(
                f"block {state.index}: the activations of the {self.module.role} are NaN or infinite; check the weights"
            )
        return moments

    def _empty_moments(self, entries: Tensor, for_choice: bool) -> ModuleMoments:
        """Return moments without tokens, with separate ones for the choice of units only if they would differ."""
        width, device = self.stream.width, self.stream.device

        def empty() -> Moments:
            return Moments(len(entries), width, centre=self.target.fits_bias, device=device)

        fit, module_input = empty(), None
        choice = empty() if for_choice and self.state.rows.choice_weights is not None else fit
        kind = self.module.kind
        if for_choice and kind == "channels" and self.state.method.criteria.of_kind(kind).input_moments:
            module_input = Moments(width, device=device)
        return ModuleMoments(entries, fit, choice, module_input)

    def _collect_batch(self, moments: ModuleMoments, at: Batch, stored: Activations, all_entries: bool) -> None:
        """Run one batch, store its inputs, and add it to the moments."""
        module, stream = self.module, self.stream
        layers = [*([] if moments.module_input is None else [module.input_layer]), module.output_layer]
        seen = self.state.layer_inputs(module, self.pruned, at, *layers)
        x = seen[module.output_layer].flatten(0, -2)
        stored[at] = x = x if all_entries else x[:, moments.entries]
        batch = self.target.of(at)
        x = batch.scaled(x)
        # If the fit and the choice share their moments, the dict has one item, and rows are added once.
        parts = {moments.choice: at.choice_weight, moments.fit: at.weight}
        with stream.rounded_sums():
            for part, weight in parts.items():
                if weight:
                    part.update(x, batch.target_nd, weight, batch.weights_n)
            if at.choice_weight and moments.module_input is not None:
                moments.module_input.update(seen[module.input_layer].reshape(-1, stream.width), weight=at.choice_weight)

    @contextmanager
    def linearised(
        self, moments: ModuleMoments, kept: Tensor, output: OutputFit, add: AddRows
    ) -> Iterator[Callable[[], Iterator[TangentRows]]]:
        """Linearise the module on the tokens of the pruned stream; the rows are stored until the context ends."""
        state, width, dtype = self.state, self.stream.width, fast_dtype(self.stream.device)
        inputs = state.arena.empty(state.rows, width, dtype)
        factors = [state.arena.empty(state.rows, len(kept), dtype) for _ in self.module.channel_projections]
        outputs_of = self._times(moments, output.weight_kd, kept)
        for at in self._fit_batches:
            rows, residual, root = self._linearise_batch(at, kept, output, outputs_of)
            inputs[at] = rows.input_nd
            for stored, factor in zip(factors, rows.factors_nk, strict=True):
                stored[at] = factor
            with self.stream.rounded_sums():
                add(rows.to(dtype), residual.to(dtype), root)

        def parts() -> Iterator[TangentRows]:
            for at in self._fit_batches:
                x = inputs[at].to(self.stream.device).reshape(-1, width)
                yield TangentRows(x, [stored[at].to(self.stream.device).reshape(len(x), -1) for stored in factors])

        yield parts
        for stored in (inputs, *factors):
            state.arena.release(stored)

    def _linearise_batch(
        self, at: Batch, kept: Tensor, output: OutputFit, outputs_of: Callable[[Batch], Tensor]
    ) -> tuple[TangentRows, Tensor, Tensor]:
        """Return the linearised rows of a batch, their residuals (n x d) and the roots of the token weights (n x 1)."""
        module, state, stream = self.module, self.state, self.stream
        layer, activation = module.input_layer, activation_of(stream.checkpoint.config, state.layer)
        x = state.layer_inputs(module, self.pruned, at, layer)[layer].reshape(-1, stream.width)
        batch = self.target.of(at)
        roots = torch.ones(len(x), device=stream.device) if batch.weights_n is None else batch.weights_n.sqrt()
        root_n1 = at.weight**0.5 * roots[:, None]
        scale = batch.scaled(root_n1)
        with stream.rounded_sums():
            y, projected = outputs_of(at).reshape(len(x), -1), projection_outputs(module, state.tensors, x, kept)
        target = batch.target_nd if output.bias_d is None else batch.target_nd - output.bias_d
        residual = target * root_n1 - y * scale
        return TangentRows(x, [factor * scale for factor in tangent_factors(activation, projected)]), residual, root_n1

    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Let the block compute with new tensors."""
        self.state.set_tensors(tensors)

    def store(self, fitted: FittedModule) -> None:
        """Put the fitted output projection in place; inputs of removed units keep old weights and are cut later."""
        full = self.norm.scale(self.weight).clone()
        full[fitted.kept_inputs] = fitted.output.weight_kd
        tensors = self.as_tensor(full)
        if fitted.output.bias_d is not None:
            tensors[self.module.bias_name] = fitted.output.bias_d
        self.state.set_tensors(tensors)

    def advance(self, fitted: FittedModule) -> None:
        """Compute the module's outputs in the pruned stream from its stored inputs, and free the inputs."""
        module, state = self.module, self.state
        outputs_of = self._times(fitted.moments, self.weight[fitted.kept_inputs], fitted.kept_inputs)
        bias = state.tensors.get(module.bias_name)
        output = state.outputs[module.kind] = state.arena.empty(state.rows, self.stream.width)
        for at in state.rows.batches():
            # Inputs and weights are rounded already; the massive activations of a few tokens must not be.
            with self.stream.rounded_sums():
                y = outputs_of(at)
            output[at] = y if bias is None else y + bias
        self._release()

    def _times(self, moments: ModuleMoments, weight_kd: Tensor, kept: Tensor) -> Callable[[Batch], Tensor]:
        """Return a function from a batch to its stored inputs times a weight of the kept ones (b x t x d), float32.

        Removed inputs are multiplied by zeros, which is faster than to take them out.
        """
        stored, full = self._stored, weight_kd.new_zeros(len(moments.entries), weight_kd.shape[1])
        assert stored is not None
        full[moments.positions(kept)] = weight_kd
        return lambda batch: stored[batch].to(weight_kd.device, torch.float32) @ full

    def _release(self) -> None:
        """Give the memory of the stored inputs back."""
        if self._stored is not None:
            self.state.arena.release(self._stored)
        self._stored = None
