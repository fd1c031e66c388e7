"""A fitted block, cut to the tensors that an output holds."""

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.fit.fitted_block import FittedBlock
from secateur.model.stream import BlockStream
from secateur.model.surgery import slice_block


def slice_fitted(stream: BlockStream, block: FittedBlock, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return all tensors of a block as they will be written, by their names inside the block.

    Args:
        stream: the open model; the block's tensors are read again.
        block: the choice of units and the refitted weights.
        dtype: of the result; the checkpoint's by default.

    Raises:
        SecateurError: a refitted weight is beyond what the dtype holds.
    """
    dtype = dtype or stream.checkpoint.dtype
    tensors = stream.stored(block.index, without=block.changed) | block.changed
    # What is finer than the other weights stays so: an expert's part in the choice of experts.
    exact = {name for name, _ in stream.layers.get_submodule(str(block.index)).named_buffers()}
    rounded = {name: tensor if name in exact else tensor.to(dtype) for name, tensor in tensors.items()}
    for name in block.changed:
        if not bool(torch.isfinite(rounded[name]).all()):
            raise SecateurError(
                f"block {block.index}: the refitted {name} is more than {str(dtype).removeprefix('torch.')} holds; "
                "take bfloat16 or float32"
            )
    return slice_block(stream.blocks[block.index], rounded, block.keep)
