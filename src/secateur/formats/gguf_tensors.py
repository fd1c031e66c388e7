"""The tensors of a GGUF file: names, shapes and types at once, and the values of each tensor when it is written."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from secateur.base.errors import SecateurError
from secateur.formats.gguf_architecture import Architecture
from secateur.formats.gguf_block import FileBlock, place_of
from secateur.formats.gguf_layers import Tensors, stored_tensor
from secateur.formats.gguf_lazy import LazyTensor
from secateur.formats.gguf_model import GgufModel
from secateur.formats.gguf_types import Storage
from secateur.model.gguf_layout import changes_of
from secateur.model.gguf_rope import rope_tensors


@dataclass(frozen=True)
class FileTensor:
    """Tensor of a file."""

    name: str
    """llama.cpp's name."""
    values: LazyTensor
    type: GGMLQuantizationType
    storage: Storage

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return bytes_of(self.values.shape, self.type)

    def data(self) -> np.ndarray[Any, Any]:
        """Return the bytes to write.

        Raises:
            SecateurError: A weight is too large for the type.
        """
        return self.storage.data(self.name, self.values.compute().float().contiguous().numpy(), self.type)

    @classmethod
    def of(cls, name: str, values: LazyTensor, storage: Storage) -> "FileTensor":
        """Return a tensor in the type that a file gives it."""
        return cls(name, values, storage.type_of(name, values.shape), storage)


def bytes_of(shape: tuple[int, ...], type: GGMLQuantizationType) -> int:
    """Return the bytes that a tensor of some shape and type has in a file."""
    block, size = gguf.GGML_QUANT_SIZES[type]
    return int(np.prod(shape)) // block * size


def file_tensors(model: GgufModel, architecture: Architecture) -> list[FileTensor]:
    """Return every tensor of the file, in its order.

    Raises:
        SecateurError: A stored tensor is missing, has another shape than config.json gives it, or has no place.
    """
    outside = _outside_blocks(model, architecture).items()
    tensors = [FileTensor.of(name, values, model.storage) for name, values in outside]
    for index in range(len(model.blocks)):
        tensors += block_tensors(model, architecture, index)
    return tensors


def block_tensors(model: GgufModel, architecture: Architecture, index: int) -> Iterator[FileTensor]:
    """Yield the tensors of one block. Errors are the same as in `file_tensors`."""
    sizes = architecture.sizes(model)[index]
    for name, values in FileBlock(model, architecture, index, sizes).tensors().items():
        yield FileTensor.of(f"blk.{index}.{name}", values, model.storage)


def _outside_blocks(model: GgufModel, architecture: Architecture) -> Tensors:
    """Return the tensors outside of blocks, by llama.cpp's names.

    Raises:
        SecateurError: A tensor is missing, or llama.cpp has no place for it.
    """
    tied = bool(model.config.tie_word_embeddings)
    tensors = {place_of(model, architecture, name): stored_tensor(model, at) for name, at in model.outside.items()}
    for name in ("token_embd.weight", architecture.final_norm, None if tied else "output.weight"):
        if name is not None and name not in tensors:
            raise SecateurError(f"{model.checkpoint.source}: no tensor for {name} among the weights; restore it")
    if tied:
        tensors.pop("output.weight", None)
    if tied and architecture.output == "stored":
        tensors["output.weight"] = tensors["token_embd.weight"]
    for name in tensors:
        for change in changes_of("", name, model.config, permuted=False, order=None):
            tensors[name] = tensors[name].then(change.write)
    full_attention = model.blocks[-1].head_dim
    factors = rope_tensors(model.config, full_attention)
    return tensors | {name: LazyTensor.of(values) for name, values in factors.items()}
