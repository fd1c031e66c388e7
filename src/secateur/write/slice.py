"""Cut a block down to its kept units: new values where the refit gave some, the stored bytes elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.fit.average import FittedBlock
from secateur.model.stream import BlockStream
from secateur.model.surgery import slice_block


def slice(stream: BlockStream, block: FittedBlock, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All tensors of a block as they will be written, by their names inside the block.

    Args:
        stream: the open model; the block's tensors are read again.
        block: the choice of units and the refitted weights.
        dtype: of the result; the checkpoint's by default.
    """
    dtype = dtype or stream.checkpoint.dtype
    tensors = stream.stored(block.index) | block.changed
    return slice_block(
        stream.blocks[block.index], {name: tensor.to(dtype) for name, tensor in tensors.items()}, block.keep
    )
