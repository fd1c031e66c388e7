"""The narrowed tensors of a fitted block."""

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.fit.fitted_block import FittedBlock
from secateur.model.stream import BlockStream
from secateur.model.surgery import slice_block


def slice_fitted(stream: BlockStream, block: FittedBlock, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return all tensors of a block as they will be written: only the units that are kept, with refitted weights.

    Args:
        stream: The open model, from which the tensors of the block are read again.
        block: The units that are kept, and the refitted weights.
        dtype: Dtype of the result; by default the checkpoint's dtype.

    Returns:
        Tensors by their names inside the block.

    Raises:
        SecateurError: A refitted weight is larger than the largest number of the dtype.
    """
    dtype = dtype or stream.checkpoint.dtype
    tensors = stream.stored(block.index, without=block.changed) | block.changed
    # Buffers keep their own, finer dtype, such as the biases of a router.
    buffers = {name for name, _ in stream.layers.get_submodule(str(block.index)).named_buffers()}
    rounded = {name: tensor if name in buffers else tensor.to(dtype) for name, tensor in tensors.items()}
    for name in block.changed:
        if not bool(torch.isfinite(rounded[name]).all()):
            wanted = str(dtype).removeprefix("torch.")
            raise SecateurError(
                f"block {block.index}: a refitted weight of {name} is too large for {wanted}; use --dtype bfloat16 or "
                "float32"
            )
    return slice_block(stream.blocks[block.index], rounded, block.keep)
