"""One block while it is pruned: its weights, and what its modules give in the dense and in the pruned stream.

The block's dense forward, which all fits share, gives the residual stream after either module. The modules are then
pruned in turn (`secateur.fit.stage`), each on what those before it yield, and the pruned stream advances by their
outputs.

Shapes: rows x t x d for stored activations, t positions, d residual width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.criteria.registry import Criteria
from secateur.fit.recovery import Recovery, recovery_of
from secateur.model.arena import Activations, Arena
from secateur.model.rows import Batch, Rows
from secateur.model.stream import BlockStream
from secateur.model.structure import PrunableModule
from secateur.model.surgery import assign


@dataclass(frozen=True)
class Method:
    """How units are chosen, and how the others make up for them."""

    criterion: str | Criteria = "surgeon"
    recovery: Recovery = field(default_factory=recovery_of)
    seed: int = 0
    """Of the criterion `random`."""

    @property
    def criteria(self) -> Criteria:
        """The criterion of every module."""
        return Criteria.of(self.criterion)


@dataclass(frozen=True)
class DenseBlock:
    """What a dense block gives."""

    goal: dict[str, Activations]
    """Residual stream after each module."""
    output: dict[str, Activations]
    """Level-2 outputs."""
    input: dict[str, Activations]
    """Module inputs, where the recovery reads them; empty otherwise."""

    @classmethod
    def run(
        cls,
        stream: BlockStream,
        index: int,
        layer: nn.Module,
        rows: Rows,
        dense: Activations,
        arena: Arena,
        inputs: bool,
    ) -> "DenseBlock":
        """Advance the dense stream of some rows in place through a filled block."""
        modules = stream.blocks[index].modules
        attention, feed_forward = stream.blocks[index].kinds
        goal, output, before = (
            {kind: arena.empty(rows, stream.width) for kind in ((attention, feed_forward) if wanted else ())}
            for wanted in (True, True, inputs)
        )
        for at in rows.batches():
            seen: dict[str, tuple[Tensor, Tensor]] = {}
            watch = {module.output_layer: _keep_both(seen, module.output_layer) for module in modules}
            if inputs:
                watch |= {
                    module.input_layer: _keep_both(seen, module.input_layer)
                    for module in modules
                    if module.input_projections
                }
            after = stream.run_through(index, layer, dense[at], at.group, watch=watch)
            for module in modules:
                output[module.kind][at] = seen[module.output_layer][1]
                if inputs and module.input_projections:
                    before[module.kind][at] = seen[module.input_layer][0]
            replay = dict(zip(modules, (output[attention][at], None), strict=True))
            goal[attention][at] = cls._modules(stream, index, layer, dense, at, replay)
            if stream.beside.own_inputs:
                replay = {module: output[module.kind][at] for module in modules}
                goal[feed_forward][at] = cls._modules(stream, index, layer, dense, at, replay)
            else:
                goal[feed_forward][at] = stream.residual(after)
            dense[at] = after
        return cls(goal, output, before)

    @staticmethod
    def _modules(
        stream: BlockStream,
        index: int,
        layer: nn.Module,
        dense: Activations,
        at: Batch,
        replay: Mapping[PrunableModule, Tensor | None],
    ) -> Tensor:
        """The residual stream behind modules that are replayed."""
        return stream.residual(stream.run_through(index, layer, dense[at], at.group, replay=replay, modules=True))

    def release(self, arena: Arena) -> None:
        """Give all room back."""
        for tensor in (*self.goal.values(), *self.output.values(), *self.input.values()):
            arena.release(tensor)


class BlockState:
    """One block's weights, goals and outputs, while it is being pruned."""

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
        self.changed: dict[str, Tensor] = {}
        """Tensors with new values, full width, as they will be written."""
        self.goal, self.input = dense.goal, dense.input
        self.output = dict(dense.output)
        """Level-2 outputs: the dense model's at first, the pruned model's once a module is done."""

    def run_pruned(self, pruned: Activations) -> None:
        """Advance the pruned stream in place, and give the block's activations back."""
        for at in self.rows.batches():
            replay = {module: self.output[module.kind][at] for module in self.block.modules}
            pruned[at] = self.run(pruned, at, replay=replay)
        for tensor in self.output.values():
            self.arena.release(tensor)

    def run(self, hidden: Activations, at: Batch, **how: Any) -> Tensor:
        """The whole block's output for a batch of rows; `how` as in `BlockStream.run_through`."""
        return self.stream.run_through(self.index, self.layer, hidden[at], at.group, **how)

    def inputs_of(self, module: PrunableModule, pruned: Activations, at: Batch, *layers: str) -> dict[str, Tensor]:
        """Inputs of the module's `source` or `sink` in the pruned stream; nothing behind the last of them is run."""
        seen: dict[str, Tensor] = {}
        self.stream.run(
            self.index,
            self.layer,
            pruned[at],
            at.group,
            replay=self.done(module, at),
            watch={name: _keep(seen, name) for name in layers},
            until=layers[-1],
        )
        return seen

    def done(self, module: PrunableModule, at: Batch) -> dict[PrunableModule, Tensor | None]:
        """Outputs of the block's modules before this one, in the pruned stream."""
        attention = self.block.attention
        return {} if module is attention else {attention: self.output[attention.kind][at]}

    def change(self, tensors: dict[str, Tensor]) -> None:
        """Use new values from here on, rounded as they will be written."""
        for name, tensor in tensors.items():
            rounded = tensor.to(self.dtype)
            self.changed[name] = rounded.cpu()
            self.tensors[name] = self.stream.held(name, rounded)
            assign(self.layer, name, self.tensors[name])


def _keep(seen: dict[str, Tensor], name: str) -> Callable[[Tensor, Tensor], None]:
    """A watch that notes a layer's input."""
    return lambda x, _: seen.update({name: x})


def _keep_both(seen: dict[str, tuple[Tensor, Tensor]], name: str) -> Callable[[Tensor, Tensor], None]:
    """A watch that notes a layer's input and output."""
    return lambda x, z: seen.update({name: (x, z)})
