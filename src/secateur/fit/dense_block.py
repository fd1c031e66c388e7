"""Activations of a dense block on the rows of all fits, from which the targets of its modules are computed.

They are, for each module, the residual stream after it, the output of its output projection, and its input if the
recovery needs it. One forward pass of the dense block gives the outputs. The residual stream between the modules comes
from a second pass, in which these outputs are replayed.

Shapes: rows x t x d for stored activations, with t positions and d residual width.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from secateur.model.arena import Activations, Arena
from secateur.model.rows import Batch, Rows
from secateur.model.stream import BlockStream
from secateur.model.structure import PrunableModule


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
