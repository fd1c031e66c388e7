"""One block while it is pruned: its weights, and what its modules give in the dense and in the pruned stream.

The block's dense forward gives the residual stream after either module. The modules are then pruned in turn
(`secateur.fit.module`), each on what those before it yield, and the pruned stream advances by their outputs.

Shapes: rows x t x d for stored activations, t positions, d residual width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.criteria.registry import Criteria
from secateur.fit.recovery import Recovery
from secateur.model.arena import Activations, Arena
from secateur.model.rows import Batch, Rows
from secateur.model.stream import BlockStream
from secateur.model.structure import KINDS, Depth2, Kind
from secateur.model.surgery import assign


@dataclass(frozen=True)
class Method:
    """How units are chosen, and how the others make up for them."""

    criterion: str | Criteria = "surgeon"
    recovery: Recovery = field(default_factory=Recovery)
    seed: int = 0
    """Of the criterion `random`."""

    @property
    def criteria(self) -> Criteria:
        """The criterion of every module."""
        return Criteria.of(self.criterion)


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
    ):
        self.stream, self.index, self.layer, self.method = stream, index, layer, method
        self.dtype, self.rows, self.arena = dtype, rows, arena
        self.block = stream.blocks[index]
        self.tensors: dict[str, Tensor] = dict(layer.named_parameters())
        self.changed: dict[str, Tensor] = {}
        """Tensors with new values, full width, float32."""
        self.goal: dict[Kind, Activations] = {}
        """Dense residual stream after each module."""
        self.output: dict[Kind, Activations] = {}
        """Level-2 outputs: the dense model's at first, the pruned model's once a module is done."""
        self.input: dict[Kind, Activations] = {}
        """Dense module inputs, for the paper's refit of level 1."""

    def run_dense(self, dense: Activations) -> None:
        """Advance the dense stream in place, keeping what the modules are fitted to."""
        attention, feed_forward = self.block.attention, self.block.feed_forward
        for kind in KINDS:
            self.goal[kind] = self.arena.empty(self.rows, self.stream.width)
            self.output[kind] = self.arena.empty(self.rows, self.stream.width)
            if self.method.recovery.method == "paper":
                self.input[kind] = self.arena.empty(self.rows, self.stream.width)
        for at in self.rows.batches():
            seen: dict[str, tuple[Tensor, Tensor]] = {}
            watch = {m.sink: _keep_both(seen, m.sink) for m in (attention, feed_forward)}
            if self.input:
                watch |= {m.source: _keep_both(seen, m.source) for m in (attention, feed_forward)}
            after = self.run(dense, at, watch=watch)
            for module in (attention, feed_forward):
                self.output[module.kind][at] = seen[module.sink][1]
                if self.input:
                    self.input[module.kind][at] = seen[module.source][0]
            replay = {attention: self.output["heads"][at], feed_forward: None}
            self.goal["heads"][at] = self.run(dense, at, replay=replay)
            self.goal["channels"][at] = after
            dense[at] = after

    def run_pruned(self, pruned: Activations) -> None:
        """Advance the pruned stream in place, and give the block's activations back."""
        for at in self.rows.batches():
            replay = {m: self.output[m.kind][at] for m in (self.block.attention, self.block.feed_forward)}
            pruned[at] = self.run(pruned, at, replay=replay)
        for tensor in (*self.goal.values(), *self.output.values(), *self.input.values()):
            self.arena.release(tensor)

    def run(self, hidden: Activations, at: Batch, **how: Any) -> Tensor:
        """The whole block's output for a batch of rows; `how` as in `BlockStream.run_through`."""
        return self.stream.run_through(self.index, self.layer, hidden[at], at.group, **how)

    def inputs_of(self, module: Depth2, pruned: Activations, at: Batch, *layers: str) -> dict[str, Tensor]:
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

    def done(self, module: Depth2, at: Batch) -> dict[Depth2, Tensor | None]:
        """Outputs of the block's modules before this one, in the pruned stream."""
        attention = self.block.attention
        return {} if module is attention else {attention: self.output["heads"][at]}

    def change(self, tensors: dict[str, Tensor]) -> None:
        """Use new values from here on, rounded as they will be written."""
        rounded = {name: tensor.to(self.dtype).float() for name, tensor in tensors.items()}
        self.changed |= {name: tensor.cpu() for name, tensor in rounded.items()}
        self.tensors |= rounded
        for name, tensor in rounded.items():
            assign(self.layer, name, tensor)


def _keep(seen: dict[str, Tensor], name: str) -> Callable[[Tensor, Tensor], None]:
    """A watch that notes a layer's input."""
    return lambda x, _: seen.update({name: x})


def _keep_both(seen: dict[str, tuple[Tensor, Tensor]], name: str) -> Callable[[Tensor, Tensor], None]:
    """A watch that notes a layer's input and output."""
    return lambda x, z: seen.update({name: (x, z)})
