"""Regression of one module's output projection: rows X of its inputs, targets T and token weights.

    minimise over W   sum_n w_n ||x_n W - t_n||^2 + ridge * (distance of W from the old weights)

Rows come from two kinds of modules. The rows of an attention or a feed-forward are too many for memory, and are
streamed through the block batch by batch (`BlockRegression`). The rows of an expert, its gate times its inputs on the
tokens routed to it, are in memory already (`secateur.fit.mixture.ExpertRegression`). `secateur.fit.module` treats both
alike.

Shapes: n tokens of a batch (b rows of t tokens), a inputs of the output projection, k kept inputs, d residual width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.base.device import fast_dtype
from secateur.checkpoints.facts import activation_of
from secateur.criteria.registry import Criterion
from secateur.criteria.statistics import module_seed
from secateur.fit.block_state import BlockState
from secateur.fit.input_projections import TangentRows, projection_outputs, tangent_factors
from secateur.fit.output_projection import OutputFit
from secateur.fit.recovery import Recovery
from secateur.fit.target import ModuleTarget
from secateur.model.arena import Activations
from secateur.model.post_norm import PostNorm
from secateur.model.rows import Batch
from secateur.model.structure import PrunableModule
from secateur.model.surgery import kept_inputs, output_tensor, output_weight
from secateur.numerics.moments import Moments

AddRows = Callable[[TangentRows, Tensor, Tensor], None]
"""Function that takes some rows of a linearised module, their residuals (n x d), and the root of each token weight
(n x 1). Rows and residuals are multiplied by that root."""
TokenWeights = tuple[float, Tensor | None]
"""Weight of all tokens of a batch, and factors on it for single tokens (n); None if they are equal."""


class BatchRows(NamedTuple):
    """Rows of a module on one batch of tokens."""

    x_na: Tensor
    """Inputs of the output projection, times their scale."""
    target_nd: Tensor
    weights: TokenWeights
    """Token weights in fits."""
    choice_weights: TokenWeights
    """Token weights in the choice of units."""
    module_input: tuple[Tensor, TokenWeights] | None
    """Inputs of the module itself with their weights, if they are needed."""


@dataclass(frozen=True)
class ModuleMoments:
    """Moments of a module's rows and targets. With several processes, the matrices are at the owner rank."""

    entries: Tensor
    """Inputs of the output projection that the moments are taken of, ascending."""
    fit: Moments
    """Moments with the token weights of the fit."""
    choice: Moments
    """Moments with the token weights of the choice of units; the same object as `fit` if the weights are equal."""
    module_input: Moments | None = None
    """Moments of the module's own input, if the criterion asks for them."""

    def positions(self, kept: Tensor) -> Tensor:
        """Return the positions of some inputs among `entries`."""
        return torch.searchsorted(self.entries, kept)

    def rows(self, weight_ad: Tensor) -> Tensor:
        """Return the rows of a weight that belong to `entries`."""
        return weight_ad if len(weight_ad) == len(self.entries) else weight_ad[self.entries]


@dataclass(frozen=True)
class FittedModule:
    """Result of the fit of one module. Its input projections are in place; its output projection is not stored yet."""

    keep: tuple[int, ...]
    """Units that are kept."""
    kept_inputs: Tensor
    """Inputs of the output projection that are kept (k)."""
    moments: ModuleMoments
    """Moments of the last fit."""
    output: OutputFit
    """The new output projection."""


class Regression(ABC):
    """Rows, targets and token weights of one module.

    Attributes:
        state: The block.
        stream: The model.
        module: The module that is fitted.
        norm: Norm between the output projection and the residual stream; neutral if there is none.
        recovery: Recovery of this module; its ridge is higher if tokens are few.
        tokens: Number of tokens with a weight in the fit, in all processes.
        fits_inputs: Whether the input projections may be fitted.
        fits_bias: Whether the bias of the output projection is fitted.
        owner: Rank of the process that solves the normal equations.
        seed: Seed of the criterion `random`.
    """

    recovery: Recovery
    tokens: int
    fits_inputs: bool
    fits_bias = False

    def __init__(self, state: BlockState, module: PrunableModule, norm: PostNorm):
        self.state, self.stream, self.module, self.norm = state, state.stream, module, norm
        inputs = module.units * module.size
        self.owner = self.stream.processes.assign_owner(inputs**2 * (inputs + 2 * self.stream.width))
        self.seed = module_seed(state.method.seed, state.index, module.role)

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """Tensors of the module in float32, as it now computes with them."""

    @property
    def weight(self) -> Tensor:
        """Weight of the output projection (a x d), as stored."""
        return output_weight(self.module, self.tensors)

    @abstractmethod
    def criterion(self) -> Criterion:
        """Return the criterion by which units are chosen."""

    @abstractmethod
    def rows(self, entries: Tensor, with_module_input: bool) -> Iterator[BatchRows]:
        """Run the module up to its output projection, and yield some inputs of this projection, batch by batch."""

    def collect(self, keep: tuple[int, ...] | None = None) -> ModuleMoments:
        """Run the module up to its output projection, and return the moments of its rows.

        Args:
            keep: Units whose inputs are summed over; by default all units, with moments for the choice of units.

        Raises:
            SecateurError: Activations are NaN or infinite.
        """
        state, stream, kind = self.state, self.stream, self.module.kind
        units = range(self.module.units) if keep is None else keep
        entries = kept_inputs(self.module, units).to(stream.device)

        def empty() -> Moments:
            return Moments(len(entries), stream.width, centre=self.fits_bias, device=stream.device)

        fit, module_input = empty(), None
        choice = empty() if keep is None and state.rows.choice_weights is not None else fit
        if keep is None and kind == "channels" and state.method.criteria.of_kind(kind).input_moments:
            module_input = Moments(stream.width, device=stream.device)
        for batch in self.rows(entries, module_input is not None):
            # If the fit and the choice share their moments, the dict has one item, and rows are added once.
            parts = {choice: batch.choice_weights, fit: batch.weights}
            with stream.rounded_sums():
                for moments, weights in parts.items():
                    if weights[0]:
                        moments.update(batch.x_na, batch.target_nd, *weights)
                if module_input is not None and batch.module_input is not None:
                    x_nd, weights = batch.module_input
                    module_input.update(x_nd, None, *weights)
        for sums in dict.fromkeys((fit, choice, module_input)):
            if sums is not None:
                sums.reduce(stream.processes, self.owner)
        state.check_activations(fit.finite() and choice.finite(), self.module.role)
        return ModuleMoments(entries, fit, choice, module_input)

    @abstractmethod
    def linearised(
        self, moments: ModuleMoments, kept: Tensor, output: OutputFit, add: AddRows
    ) -> AbstractContextManager[Callable[[], Iterable[TangentRows]]]:
        """Linearise the module at a fit of its output projection, and call `add` with all rows, part by part.

        Inside the context, the returned function yields the same parts again.
        """

    @abstractmethod
    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Let the module compute with new tensors, rounded as they are written."""

    @abstractmethod
    def store(self, fitted: FittedModule) -> None:
        """Put the fitted output projection in place, and compute the outputs with it."""

    def as_tensor(self, weight_ad: Tensor) -> dict[str, Tensor]:
        """Return the output projection as a stored tensor, by its name, from a weight in error units."""
        return {self.module.output_projection.name: output_tensor(self.module, self.norm.unscale(weight_ad))}


class BlockRegression(Regression):
    """Regression of an attention or a feed-forward in the pruned stream.

    The inputs of the output projection are stored until the module is done. The outputs after the refit then take one
    product, and no forward pass.
    """

    def __init__(self, state: BlockState, module: PrunableModule, pruned: Activations):
        self.target = ModuleTarget(state, module, pruned)
        super().__init__(state, module, self.target.norm)
        self.pruned, self.fits_bias, self.recovery = pruned, self.target.fits_bias, state.method.recovery
        self.fits_inputs = bool(module.channel_projections)
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

    def rows(self, entries: Tensor, with_module_input: bool) -> Iterator[BatchRows]:
        """Run the pruned stream up to the output projection, store its inputs, and yield them."""
        module, state = self.module, self.state
        self._release()
        self._stored = stored = state.arena.empty(state.rows, len(entries), self.stream.products_dtype)
        layers = [*([module.input_layer] if with_module_input else []), module.output_layer]
        for at in state.rows.batches():
            seen = state.layer_inputs(module, self.pruned, at, *layers)
            x = seen[module.output_layer].flatten(0, -2)
            stored[at] = x = x if len(entries) == x.shape[1] else x[:, entries]
            target = self.target.of(at)
            inputs = None
            if with_module_input and at.choice_weight:
                inputs = seen[module.input_layer].reshape(-1, self.stream.width), (at.choice_weight, None)
            weights, choice_weights = (at.weight, target.weights_n), (at.choice_weight, target.weights_n)
            yield BatchRows(target.scaled(x), target.target_nd, weights, choice_weights, inputs)

    @contextmanager
    def linearised(
        self, moments: ModuleMoments, kept: Tensor, output: OutputFit, add: AddRows
    ) -> Iterator[Callable[[], Iterator[TangentRows]]]:
        """Linearise the module on the tokens of the pruned stream; the rows are stored until the context ends."""
        state, width, device = self.state, self.stream.width, self.stream.device
        dtype, outputs_of = fast_dtype(device), self._times(moments, output.weight_kd, kept)
        inputs = state.arena.empty(state.rows, width, dtype)
        factors = [state.arena.empty(state.rows, len(kept), dtype) for _ in self.module.channel_projections]
        for at in self._fit_batches:
            rows, residual, root = self._linearise_batch(at, kept, output, outputs_of)
            inputs[at] = rows.input_nd
            for stored, factor in zip(factors, rows.factors_nk, strict=True):
                stored[at] = factor
            with self.stream.rounded_sums():
                add(rows.to(dtype), residual.to(dtype), root)

        def parts() -> Iterator[TangentRows]:
            for at in self._fit_batches:
                x = inputs[at].to(device).reshape(-1, width)
                yield TangentRows(x, [stored[at].to(device).reshape(len(x), -1) for stored in factors])

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
        """Put the fitted output projection in place, and compute its outputs in the pruned stream.

        Inputs of removed units keep old weights and are cut later.
        """
        module, state = self.module, self.state
        full = self.norm.scale(self.weight).clone()
        full[fitted.kept_inputs] = fitted.output.weight_kd
        bias = {} if fitted.output.bias_d is None else {module.bias_name: fitted.output.bias_d}
        state.set_tensors(self.as_tensor(full) | bias)
        outputs_of = self._times(fitted.moments, self.weight[fitted.kept_inputs], fitted.kept_inputs)
        bias_d = state.tensors.get(module.bias_name)
        output = state.outputs[module.kind] = state.arena.empty(state.rows, self.stream.width)
        for at in state.rows.batches():
            # Inputs and weights are rounded already; the massive activations of a few tokens must not be.
            with self.stream.rounded_sums():
                y = outputs_of(at)
            output[at] = y if bias_d is None else y + bias_d
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
