"""Activations and tensors of a block during its fits: what the dense block computes, and what the pruned block holds.

`DenseBlock` has the activations of the dense block on the rows of all fits, from which the targets of its modules are
computed: for each module, the residual stream after it, the output of its output projection, and its input if the
recovery needs it. One forward pass of the dense block gives the outputs. The residual stream between the modules comes
from a second pass, in which these outputs are replayed.

`BlockState` belongs to one fit. Modules are pruned one after the other. As soon as a module is done, its new output
replaces the dense one, so that the next module reads the inputs that it has in the pruned model.

Shapes: rows x t x d for stored activations, with t positions and d residual width.
"""

import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor, nn

from secateur.base.errors import SecateurError
from secateur.checkpoints.expert_matrices import BlockTensor, ExpertMatrices
from secateur.fit.recovery import Method
from secateur.model.arena import Activations, Arena, FileRows
from secateur.model.rows import Batch, Rows
from secateur.model.stream import BlockStream
from secateur.model.structure import PrunableModule
from secateur.model.surgery import assign, tensors_of


@dataclass(frozen=True)
class DenseBlock:
    """Activations of a dense block, by the kind of units of each module."""

    residual: dict[str, Activations]
    """Residual stream after each module."""
    outputs: dict[str, Activations]
    """Output of each output projection."""
    inputs: dict[str, Activations]
    """Input of each module, if the recovery needs it; otherwise empty."""

    @classmethod
    def run(
        cls,
        stream: BlockStream,
        index: int,
        layer: nn.Module,
        rows: Rows,
        dense: Activations,
        arena: Arena,
        with_inputs: bool,
    ) -> "DenseBlock":
        """Run some rows of the dense stream through a filled block, in place, and keep what the fits need."""
        kinds = [module.kind for module in stream.blocks[index].modules_left]

        def empty(kinds: Collection[str]) -> dict[str, Activations]:
            return {kind: arena.empty(rows, stream.width) for kind in kinds}

        result = cls(empty(kinds), empty(kinds), empty(kinds if with_inputs else ()))
        for at in rows.batches():
            result._run_batch(stream, index, layer, dense, at)
        return result

    def _run_batch(self, stream: BlockStream, index: int, layer: nn.Module, dense: Activations, at: Batch) -> None:
        """Run one batch of the dense stream, in place."""
        modules = stream.blocks[index].modules_left
        with_inputs = [module for module in modules if self.inputs and module.input_projections]
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        watched = [module.output_layer for module in modules] + [module.input_layer for module in with_inputs]
        watch = {name: _record(seen, name) for name in watched}
        after = stream.run_through(index, layer, dense[at], at.group, watch=watch)
        for module in modules:
            self.outputs[module.kind][at] = seen[module.output_layer][1]
        for module in with_inputs:
            self.inputs[module.kind][at] = seen[module.input_layer][0]

        outputs: dict[PrunableModule, Tensor | None] = {module: self.outputs[module.kind][at] for module in modules}
        for module, residual in residuals(stream, index, layer, dense[at], at.group, outputs, after):
            self.residual[module.kind][at] = residual
        dense[at] = after

    def release(self, arena: Arena) -> None:
        """Give the memory of all activations back."""
        for activations in (*self.residual.values(), *self.outputs.values(), *self.inputs.values()):
            arena.release(activations)


def residuals(
    stream: BlockStream,
    index: int,
    layer: nn.Module,
    hidden_btc: Tensor,
    group: int,
    outputs: dict[PrunableModule, Tensor | None],
    after_btc: Tensor,
) -> Iterator[tuple[PrunableModule, Tensor]]:
    """Yield each module of a block with the residual stream after it (b x t x d).

    Args:
        hidden_btc: The stream before the block.
        group: Index of the batch's group of rows.
        outputs: Output of each output projection, in the order of the modules.
        after_btc: The stream after the block.
    """
    modules = stream.blocks[index].modules
    for module in outputs:
        later, hidden = modules[modules.index(module) + 1 :], after_btc
        # A block with token inputs adds a third term to the residual stream, which is no part of any target.
        if later or stream.side_inputs.has_token_inputs:
            replay = outputs | dict.fromkeys(later)
            hidden = stream.run_through(index, layer, hidden_btc, group, replay=replay, modules_only=True)
        yield module, stream.residual(hidden)


def _record(seen: dict[str, tuple[Tensor, Tensor]], name: str) -> Callable[[Tensor, Tensor], None]:
    """Return a hook that records a layer's input and output."""
    return lambda x, z: seen.update({name: (x, z)})


class BlockState:
    """State of a block while it is pruned and refitted.

    Attributes:
        stream: The model.
        index: Number of the block.
        layer: The filled block, which computes with the new tensors.
        method: Criterion and recovery.
        dtype: Dtype in which new tensors are written.
        rows: Rows of this fit.
        arena: Memory that holds activations.
        block: Description of the dense block.
        tensors: Tensors of the block, as it now computes with them.
        changed: New tensors at full width, as they are written.
        dense_residual: Dense residual stream after each module.
        dense_inputs: Dense inputs of the modules, if the recovery needs them.
        outputs: Output of each output projection, in the pruned model if the module is done, else in the dense model.
    """

    def __init__(
        self,
        stream: BlockStream,
        index: int,
        layer: nn.Module,
        method: Method,
        dtype: torch.dtype,
        rows: Rows,
        arena: Arena,
        dense: DenseBlock,
    ):
        self.stream, self.index, self.layer, self.method = stream, index, layer, method
        self.dtype, self.rows, self.arena = dtype, rows, arena
        self.block = stream.blocks[index]
        self.tensors: dict[str, Tensor] = layer.state_dict()
        self.changed: dict[str, BlockTensor] = {}
        self.dense_residual, self.dense_inputs, self.outputs = dense.residual, dense.inputs, dict(dense.outputs)

    def advance(self, pruned: Activations) -> dict[str, tuple[float, float]]:
        """Run the pruned stream through the block in place, and give the memory of the outputs back.

        Returns:
            The error after each module, by its kind: the mean of ||pruned - dense||^2 over the tokens with their
            weights, where both are the residual stream; and this error divided by the mean of ||dense||^2.
        """
        modules = self.block.modules_left
        sums = [torch.zeros(0, 1 + 2 * len(modules), dtype=torch.float64)]
        for at in self.rows.batches():
            outputs: dict[PrunableModule, Tensor | None] = {one: self.outputs[one.kind][at] for one in modules}
            after = self.run(pruned, at, replay=outputs)
            if at.weight:
                parts = [float(self.rows.ids(at).numel())]
                place = self.stream, self.index, self.layer, pruned[at], at.group
                for module, residual in residuals(*place, outputs, after):
                    dense = self.dense_residual[module.kind][at].to(residual.device)
                    parts += [float(torch.linalg.vector_norm(one)) ** 2 for one in (residual - dense, dense)]
                sums.append(at.weight * torch.tensor([parts], dtype=torch.float64))
            pruned[at] = after
        for output in self.outputs.values():
            self.arena.release(output)
        count, *totals = self.stream.processes.gather(torch.cat(sums)).sum(0).tolist()
        pairs = zip(modules, totals[::2], totals[1::2], strict=True)
        return {one.kind: (error / count, error / energy if energy else 0.0) for one, error, energy in pairs}

    def run(self, hidden: Activations, at: Batch, **options: Any) -> Tensor:
        """Return the block's output for a batch of rows; `options` are passed to `BlockStream.run_through`."""
        return self.stream.run_through(self.index, self.layer, hidden[at], at.group, **options)

    def layer_inputs(self, module: PrunableModule, pruned: Activations, at: Batch, *layers: str) -> dict[str, Tensor]:
        """Return the inputs of some layers of a module in the pruned stream; layers after the last one do not run."""
        seen: dict[str, Tensor] = {}
        self.stream.run(
            self.index,
            self.layer,
            pruned[at],
            at.group,
            replay=self.outputs_before(module, at),
            watch={name: _record_input(seen, name) for name in layers},
            until=layers[-1],
        )
        return seen

    def outputs_before(self, module: PrunableModule, at: Batch) -> dict[PrunableModule, Tensor | None]:
        """Return the outputs, in the pruned stream, of the modules that run before a module."""
        earlier = takewhile(lambda one: one is not module, self.block.modules_left)
        return {one: self.outputs[one.kind][at] for one in earlier}

    def check_activations(self, are_finite: bool, name: str) -> None:
        """Raise `SecateurError` if the activations of a module are NaN or infinite."""
        if not are_finite:
            raise SecateurError(
                f"block {self.index}: the activations of the {name} are NaN or infinite; check the weights"
            )

    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Let the block compute with new tensors, rounded as they are written."""
        for name, tensor in tensors.items():
            rounded = tensor.to(self.dtype)
            self.changed[name] = rounded.cpu()
            self.tensors[name] = rounded.float().to(self.stream.device)
            assign(self.layer, name, self.tensors[name])

    def changeable(self, name: str) -> "ChangedMatrices":
        """Return the matrices of all experts as the block computes with them, in which single ones can be set."""
        if name not in self.changed:
            old, device = tensors_of(self.layer)[name], self.stream.device
            assert isinstance(old, ExpertMatrices)
            if device.type == "cpu":
                values = self.arena.tensor(old.shape, self.dtype)
            else:
                values = torch.empty(old.shape, dtype=self.dtype, device=device)
            self.changed[name] = matrices = ChangedMatrices(old, values)
            if device.type == "cpu":
                weakref.finalize(matrices, self.arena.free, values)
            assign(self.layer, name, matrices)
        return cast(ChangedMatrices, self.changed[name])


def _record_input(seen: dict[str, Tensor], name: str) -> Callable[[Tensor, Tensor], None]:
    """Return a hook that records a layer's input."""
    return lambda x, _: seen.update({name: x})


class ChangedMatrices(ExpertMatrices):
    """Matrices some of which have new values, in memory or in a file; old values are rounded as new ones are."""

    def __init__(self, old: ExpertMatrices, values: Tensor | FileRows):
        """Start with the old values.

        Args:
            old: The old matrices.
            values: Room for the new values of all experts.
        """
        super().__init__(old.shape, values.dtype, old.read)
        self._values, self._changed = values, set[int]()

    def read(self, expert: int) -> Tensor:
        """Return the matrix of one expert."""
        return self._values[expert] if expert in self._changed else self._read(expert).to(self.dtype)

    def write(self, expert: int, matrix: Tensor) -> None:
        """Set the matrix of one expert."""
        self._values[expert : expert + 1] = matrix[None].to(self.dtype)
        self._changed.add(expert)
