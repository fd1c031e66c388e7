"""The regression of a module of the dense block: its rows are run through the block, batch by batch.

Inputs of the output projection are kept for the length of a module, so that outputs after the refit cost one product.

Shapes: n tokens of a batch, a inputs of the output projection, k of them kept, d residual width; rows x t x a for what
is stored.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from secateur.base.device import fast_dtype
from secateur.base.errors import SecateurError
from secateur.criteria.registry import Criterion
from secateur.criteria.statistics import module_seed
from secateur.fit.block import BlockState
from secateur.fit.input_projections import Part, factors, outputs
from secateur.fit.module import Fitted
from secateur.fit.output_projection import OutputFit
from secateur.fit.regression import AddPart, Regression, Sums
from secateur.fit.target import ModuleTarget
from secateur.model.arena import Activations
from secateur.model.facts import activation_of
from secateur.model.rows import Batch
from secateur.model.structure import PrunableModule
from secateur.model.surgery import inner_entries
from secateur.numerics.moments import Moments


class BlockRegression(Regression):
    """One module of the dense block, in the pruned stream."""

    reports = True

    def __init__(self, state: BlockState, module: PrunableModule, pruned: Activations):
        self.state, self.module, self.pruned, self.stream = state, module, pruned, state.stream
        self.target = ModuleTarget(state, module, pruned)
        self.norm, self.fits_bias, self.recovery = self.target.norm, self.target.fits_bias, state.method.recovery
        inner = module.units * module.size
        self.owner = self.stream.processes.assign_owner(inner**2 * (inner + 2 * self.stream.width))
        self.seed = module_seed(state.method.seed, state.index, module.role)
        batches = [at for at in state.rows.batches() if at.weight]
        self.tokens = int(self.stream.processes.total(sum(state.rows.ids(at).numel() for at in batches)))
        self._stored: Activations | None = None

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The block's tensors."""
        return self.state.tensors

    def criterion(self) -> Criterion:
        """Return the criterion of the module."""
        return self.state.method.criteria.of_module(self.state.index, self.module.kind)

    def collect(self, keep: tuple[int, ...] | None = None) -> Sums:
        """Run the pruned stream up to the output projection, keep its inputs, and sum over them.

        Raises:
            SecateurError: activations are NaN or infinite.
        """
        state, module, stream, rows, target = self.state, self.module, self.stream, self.state.rows, self.target
        self._release()
        entries = inner_entries(module, tuple(range(module.units)) if keep is None else keep).to(stream.device)
        self._stored = stored = state.arena.empty(rows, len(entries), stream.products)
        moments = Moments(len(entries), stream.width, centre=target.fits_bias, device=stream.device)
        scored, source, watched = moments, None, [module.output_layer]
        if keep is None and rows.scores is not None:
            scored = Moments(len(entries), stream.width, centre=moments.centre, device=stream.device)
        if keep is None and module.kind == "channels" and state.method.criteria.of_kind(module.kind).input_moments:
            source = Moments(stream.width, device=stream.device)
            watched.insert(0, module.input_layer)
        for at in rows.batches():
            seen = state.inputs_of(module, self.pruned, at, *watched)
            x = seen[module.output_layer].flatten(0, -2)
            if keep is not None:
                x = x[:, entries]
            stored[at] = x
            wanted = target.of(at)
            x = wanted.scaled(x)
            # One entry where both are the same.
            with stream.rounded():
                for sums, weight in {scored: at.score, moments: at.weight}.items():
                    if weight:
                        sums.update(x, wanted.target, weight, wanted.counts)
                if at.score and source is not None:
                    source.update(seen[module.input_layer].reshape(-1, stream.width), weight=at.score)
        for one in dict.fromkeys((moments, scored, source)):
            if one is not None:
                one.reduce(stream.processes, self.owner)
        if not (moments.finite() and scored.finite()):
            raise SecateurError(f"block {state.index}: the {module.role} module gives NaN or infinite activations")
        return Sums(entries, moments, scored, source)

    @contextmanager
    def linearised(
        self, sums: Sums, kept: Tensor, fit: OutputFit, add: AddPart
    ) -> Iterator[Callable[[], Iterator[Part]]]:
        """Linearise the module on the tokens of the pruned stream; parts are stored until the context ends."""
        module, state, stream, width = self.module, self.state, self.stream, self.stream.width
        activation, dtype = activation_of(stream.checkpoint.config, state.layer), fast_dtype(stream.device)
        batches = [at for at in state.rows.batches() if at.weight]
        source = state.arena.empty(state.rows, width, dtype)
        stored = [state.arena.empty(state.rows, len(kept), dtype) for _ in module.channel_projections]
        outputs_of = self._times(sums, fit.weight_ko, kept)
        for at in batches:
            s = state.inputs_of(module, self.pruned, at, module.input_layer)[module.input_layer].reshape(-1, width)
            wanted = self.target.of(at)
            counts = torch.ones(len(s), device=stream.device) if wanted.counts is None else wanted.counts.sqrt()
            root = at.weight**0.5 * counts[:, None]
            scaled = wanted.scaled(root)
            with stream.rounded():
                given, pre = outputs_of(at).reshape(len(s), -1), outputs(module, state.tensors, s, kept)
            target = wanted.target if fit.bias is None else wanted.target - fit.bias
            residual = target * root - given * scaled
            found = [f * scaled for f in factors(activation, pre)]
            source[at] = s
            for room, factor in zip(stored, found, strict=True):
                room[at] = factor
            with stream.rounded():
                add(Part(s.to(dtype), [f.to(dtype) for f in found]), residual.to(dtype), root)

        def parts() -> Iterator[Part]:
            for at in batches:
                s = source[at].to(stream.device).reshape(-1, width)
                yield Part(s, [room[at].to(stream.device).reshape(len(s), -1) for room in stored])

        yield parts
        for room in (source, *stored):
            state.arena.release(room)

    def change(self, tensors: dict[str, Tensor]) -> None:
        """Let the block compute with new tensors."""
        self.state.change(tensors)

    def store(self, fitted: Fitted) -> None:
        """Put the fitted output projection in place; entries that go are sliced away later."""
        full = self.norm.scale(self.weight).clone()
        full[fitted.kept] = fitted.fit.weight_ko
        changes = self.stored(full)
        if fitted.fit.bias is not None:
            changes[self.module.bias_name] = fitted.fit.bias
        self.state.change(changes)

    def advance(self, fitted: Fitted) -> None:
        """Put the module's outputs in the pruned stream in place, from its stored inputs, which are given back."""
        module, state = self.module, self.state
        outputs_of = self._times(fitted.sums, self.weight[fitted.kept], fitted.kept)
        bias = state.tensors.get(module.bias_name)
        output = state.output[module.kind] = state.arena.empty(state.rows, self.stream.width)
        for at in state.rows.batches():
            # Inputs and weights are rounded already; the massive activations of a few tokens must not be.
            with self.stream.rounded():
                y = outputs_of(at)
            output[at] = y if bias is None else y + bias
        self._release()

    def _times(self, sums: Sums, weight_kd: Tensor, kept: Tensor) -> Callable[[Batch], Tensor]:
        """Return a function from a batch to its stored inputs times a weight of the kept ones (b x t x d), float32.

        Inputs that go are multiplied by zeros: taking the others out would take longer.
        """
        stored, full = self._stored, weight_kd.new_zeros(len(sums.entries), weight_kd.shape[1])
        assert stored is not None
        full[sums.among(kept)] = weight_kd
        return lambda batch: stored[batch].to(weight_kd.device, torch.float32) @ full

    def _release(self) -> None:
        """Give the room of stored inputs back."""
        if self._stored is not None:
            self.state.arena.release(self._stored)
        self._stored = None
