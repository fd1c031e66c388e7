"""How large activations are, block by block: what the paper's figure 5 holds two models against each other by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.base.progress import Silent, Watcher
from secateur.model.arena import Arena
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream


@dataclass(frozen=True)
class Magnitudes:
    """Mean absolute activations of one block, over all tokens and dimensions."""

    stream: float
    """Of the residual stream that enters the block."""
    heads: float
    """Of what the attention's output layer sees."""
    channels: float
    """Of what the feed-forward's output layer sees."""


def magnitudes(stream: BlockStream, rows: Tensor | Rows, *, watcher: Watcher | None = None) -> list[Magnitudes]:
    """Run the dense model block by block and take mean |x|.

    Args:
        stream: an open model; one block of it is in memory at a time.
        rows: tokens (rows x length).
        watcher: told about progress.

    Returns:
        One for each block, in order.

    Raises:
        SecateurError: a block gives NaN or infinite values.
    """
    rows, result = Rows.of(rows), []
    with Arena() as arena:
        hidden = stream.embed(rows, arena)
        for index in (watcher or Silent()).track(range(len(stream)), "Measure"):
            block = stream.blocks[index]
            inner = {module.sink: _Mean() for module in (block.attention, block.feed_forward)}
            entering = _Mean()
            with stream.filled(index) as layer:
                for at in rows.batches():
                    before = hidden[at]
                    entering.add(before, before)
                    watch = {path: mean.add for path, mean in inner.items()}
                    hidden[at] = stream.run_through(index, layer, before, at.group, watch=watch)
            heads, channels = (mean.value for mean in inner.values())
            result.append(Magnitudes(entering.value, heads, channels))
    return result


class _Mean:
    """A running mean of absolute values, in float64."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, x: Tensor, _: Tensor) -> None:
        """Take a layer's input; its output is of no interest."""
        # Row by row in float32, then float64 on the host: not every accelerator has the latter.
        self.total += float(x.abs().flatten(0, -2).mean(-1).cpu().to(torch.float64).sum()) * x.shape[-1]
        self.count += x.numel()

    @property
    def value(self) -> float:
        return self.total / self.count
