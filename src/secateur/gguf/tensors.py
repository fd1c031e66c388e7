"""The tensors of a GGUF file: names, shapes and types at once, and the values of each tensor when it is written."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from torch import Tensor
from torch.nn import functional

from secateur.base.errors import SecateurError
from secateur.gguf.architecture import Architecture
from secateur.gguf.layers import LazyTensor, Tensors, expert_tensors, layer_tensors, stored_tensor
from secateur.gguf.layout import changes_of, gguf_name, split_of
from secateur.gguf.model import QKV, GgufModel
from secateur.gguf.positions import rope_tensors
from secateur.gguf.types import Storage


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
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.values.shape) // block * size

    def data(self) -> np.ndarray[Any, Any]:
        """Return the bytes to write.

        Raises:
            SecateurError: A weight is too large for the type.
        """
        return self.storage.data(self.name, self.values.compute().float().contiguous().numpy(), self.type)


def file_tensors(model: GgufModel, architecture: Architecture) -> list[FileTensor]:
    """Return every tensor of the file, in its order.

    Raises:
        SecateurError: The architecture has no place for a stored tensor.
    """
    tensors = list(_typed(model, _outside_blocks(model, architecture)))
    for index in range(len(model.blocks)):
        tensors += block_tensors(model, architecture, index)
    return tensors


def _typed(model: GgufModel, tensors: Tensors) -> Iterator[FileTensor]:
    """Yield tensors in the types that a file gives them."""
    for name, values in tensors.items():
        yield FileTensor(name, values, model.storage.type_of(name, values.shape), model.storage)


def _outside_blocks(model: GgufModel, architecture: Architecture) -> Tensors:
    """Return the tensors outside of blocks, by llama.cpp's names."""
    tied = bool(model.config.tie_word_embeddings)
    tensors = {_place_of(model, architecture, name): stored_tensor(model, at) for name, at in model.outside.items()}
    if tied:
        tensors.pop("output.weight", None)
    if tied and architecture.output == "stored":
        tensors["output.weight"] = tensors["token_embd.weight"]
    for name in tensors:
        for change in changes_of("", name, model.config, architecture):
            tensors[name] = tensors[name].then(change.write)
    factors = rope_tensors(model.config, model.blocks[-1].head_dim)
    return tensors | {name: LazyTensor(tuple(values.shape), values.clone) for name, values in factors.items()}


def _place_of(model: GgufModel, architecture: Architecture, name: str) -> str:
    """Return llama.cpp's name of a tensor, by transformers' name in the whole model.

    Raises:
        SecateurError: The architecture has no place for the tensor.
    """
    found = gguf_name(architecture.name, len(model.blocks), name)
    if found is None:
        raise SecateurError(
            f"{model.checkpoint.source}: GGUF has no place for tensor {name}; "
            "remove it if the model does not need it, or keep the safetensors folder"
        )
    return found


def block_tensors(model: GgufModel, architecture: Architecture, index: int) -> Iterator[FileTensor]:
    """Yield the tensors of one block. Errors are the same as in `file_tensors`."""
    sizes, parts = architecture.sizes(model)[index], _stored_parts(model, architecture, index)
    if model.blocks[index].heads:
        _rescale_scores(parts, architecture.score_ratio(model, index))
    elif sizes.heads:
        parts |= _idle_head(model, architecture)
    else:
        parts = {name: tensor for name, tensor in parts.items() if not name.startswith("attn_")}
    if not sizes.experts:
        _fill_channels(model, parts, sizes.channels or 0)
    if architecture.needs_biases:
        for layer in model.layers:
            parts.setdefault(f"{layer}.bias", LazyTensor.full(parts[f"{layer}.weight"].shape[:1], 0.0))
    for name, layers in architecture.fused.items():
        for leaf in ("weight", "bias"):
            rows = [parts.pop(f"{layer}.{leaf}") for layer in layers if f"{layer}.{leaf}" in parts]
            if rows:
                parts[f"{name}.{leaf}"] = LazyTensor.concatenated(rows)
    return _typed(model, {f"blk.{index}.{name}": values for name, values in parts.items()})


def _stored_parts(model: GgufModel, architecture: Architecture, index: int) -> Tensors:
    """Return the tensors of a block that the checkpoint stores, with llama.cpp's names and order of entries."""
    layers, (experts, pieces) = layer_tensors(model, index), expert_tensors(model, index)
    narrowed = {f"{name}.{leaf}" for name in model.layers.values() for leaf in ("weight", "bias")}
    parts, own_names = layers | experts, dict.fromkeys([*layers, *experts], "")
    for name, stored in model.inside[index].items():
        # Parameters of an activation are metadata.
        if name in narrowed or stored in pieces or ".act_fn." in name:
            continue
        tensor = stored_tensor(model, stored)
        if split := split_of(name):
            parts |= {place: tensor.then(split.part(number, model.config)) for number, place in enumerate(split.names)}
        else:
            whole = f"{model.family.blocks}.{index}.{name}"
            place = _place_of(model, architecture, whole).removeprefix(f"blk.{index}.")
            parts[place], own_names[place] = tensor, name
    for place, name in own_names.items():
        for change in changes_of(name, place, model.config, architecture):
            parts[place] = parts[place].then(change.write)
    return parts


def _rescale_scores(parts: Tensors, ratio: float) -> None:
    """Multiply queries by the ratio between the model's scale of attention scores and llama.cpp's."""
    if ratio == 1:
        return
    # A norm of queries would undo a factor on the query layer. So the factor goes into the norm, if there is one.
    for name in {"attn_q_norm.weight"} & parts.keys() or {"attn_q.weight", "attn_q.bias"} & parts.keys():
        parts[name] = parts[name].then(lambda values: values.float() * ratio)


def _idle_head(model: GgufModel, architecture: Architecture) -> Tensors:
    """Return an attention of one head whose output is multiplied by zero."""
    hidden, dim = model.config.hidden_size, model.dim
    tensors = {f"{layer}.weight": LazyTensor.full((dim, hidden), 0.0) for layer in QKV}
    tensors["attn_output.weight"] = LazyTensor.full((hidden, dim), 0.0)
    for norm in ("attn_q_norm.weight", "attn_k_norm.weight"):
        if gguf_name(architecture.name, 1, f"blk.0.{norm}") is not None:
            tensors[norm] = LazyTensor.full((dim,), 1.0)
    return tensors


def _fill_channels(model: GgufModel, parts: Tensors, channels: int) -> None:
    """Add channels whose weights are zero to a feed-forward, up to the number in the file."""
    hidden = model.config.hidden_size
    empty = {"ffn_gate": (0, hidden), "ffn_up": (0, hidden), "ffn_down": (hidden, 0)}
    for layer in filter(model.layers.__contains__, empty):
        parts.setdefault(f"{layer}.weight", LazyTensor.full(empty[layer], 0.0))
        for name in {f"{layer}.weight", f"{layer}.bias"} & parts.keys() - {"ffn_down.bias"}:
            parts[name] = parts[name].then(partial(_padded, axis=empty[layer].index(0), size=channels))


def _padded(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Return a vector or matrix with zeros added at the end of an axis, up to a size."""
    later = (0, 0) * (tensor.dim() - 1 - axis)
    return functional.pad(tensor, (*later, 0, size - tensor.shape[axis]))
