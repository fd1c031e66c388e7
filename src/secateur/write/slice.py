"""The narrowed tensors of a fitted block."""

from functools import partial

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.checkpoints.expert_matrices import BlockTensor, matrix_by_matrix
from secateur.fit.fitted_block import FittedBlock
from secateur.model.stream import BlockStream
from secateur.model.surgery import slice_block


def slice_fitted(
    stream: BlockStream, block: FittedBlock, *, dtype: torch.dtype | None = None
) -> dict[str, BlockTensor]:
    """Return all tensors of a block as they will be written: only the units that are kept, with refitted weights.

    Args:
        stream: The open model, from which the tensors of the block are read again.
        block: The units that are kept, and the refitted weights.
        dtype: Dtype of the result; by default the checkpoint's dtype.

    Returns:
        Tensors by their names inside the block. Matrices of experts are computed when they are used.

    Raises:
        SecateurError: A refitted weight is larger than the largest number of the dtype; for matrices of experts, the
            error comes when they are used.
    """
    dtype = dtype or stream.checkpoint.dtype
    tensors = stream.block_tensors(block.index, without=block.changed) | block.changed
    rounded = {
        name: tensor if stream.keeps_dtype(block.index, name) else tensor.to(dtype) for name, tensor in tensors.items()
    }
    for name in block.changed:
        rounded[name] = matrix_by_matrix(partial(_finite, f"block {block.index}", name), rounded[name], dtype=dtype)
    return slice_block(stream.blocks[block.index], rounded, block.keep)


def _finite(where: str, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor unchanged.

    Raises:
        SecateurError: It has an infinite entry.
    """
    if not bool(torch.isfinite(tensor).all()):
        wanted = str(tensor.dtype).removeprefix("torch.")
        raise SecateurError(
            f"{where}: a refitted weight of {name} is too large for {wanted}; use --dtype bfloat16 or float32"
        )
    return tensor
