"""The tensors of a GGUF file: names, shapes and types at once, and the values of each tensor when it is written."""

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
from secateur.gguf.model import QKV, BlockSizes, GgufModel
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
        return bytes_of(self.values.shape, self.type)

    def data(self) -> np.ndarray[Any, Any]:
        """Return the bytes to write.

        Raises:
            SecateurError: A weight is too large for the type.
        """
        return self.storage.data(self.name, self.values.compute().float().contiguous().numpy(), self.type)


def bytes_of(shape: tuple[int, ...], type: GGMLQuantizationType) -> int:
    """Return the bytes that a tensor of some shape and type has in a file."""
    block, size = gguf.GGML_QUANT_SIZES[type]
    return int(np.prod(shape)) // block * size


def file_tensors(model: GgufModel, architecture: Architecture) -> list[FileTensor]:
    """Return every tensor of the file, in its order.

    Raises:
        SecateurError: A stored tensor is missing, has another shape than config.json gives it, or has no place.
    """
    tensors = list(_typed(model, _outside_blocks(model, architecture)))
    for index in range(len(model.blocks)):
        tensors += block_tensors(model, architecture, index)
    return tensors


def block_tensors(model: GgufModel, architecture: Architecture, index: int) -> Iterator[FileTensor]:
    """Yield the tensors of one block. Errors are the same as in `file_tensors`."""
    parts = _FileBlock(model, architecture, index, architecture.sizes(model)[index]).tensors()
    return _typed(model, {f"blk.{index}.{name}": values for name, values in parts.items()})


def _typed(model: GgufModel, tensors: Tensors) -> Iterator[FileTensor]:
    """Yield tensors in the types that a file gives them."""
    for name, values in tensors.items():
        yield FileTensor(name, values, model.storage.type_of(name, values.shape), model.storage)


def _outside_blocks(model: GgufModel, architecture: Architecture) -> Tensors:
    """Return the tensors outside of blocks, by llama.cpp's names.

    Raises:
        SecateurError: A tensor is missing, or llama.cpp has no place for it.
    """
    tied = bool(model.config.tie_word_embeddings)
    tensors = {_place_of(model, architecture, name): stored_tensor(model, at) for name, at in model.outside.items()}
    for name in ("token_embd.weight", architecture.final_norm, None if tied else "output.weight"):
        if name is not None and name not in tensors:
            raise SecateurError(f"{model.checkpoint.source}: no tensor for {name} among the weights; restore it")
    if tied:
        tensors.pop("output.weight", None)
    if tied and architecture.output == "stored":
        tensors["output.weight"] = tensors["token_embd.weight"]
    for name in tensors:
        for change in changes_of("", name, model.config, architecture):
            tensors[name] = tensors[name].then(change.write)
    factors = rope_tensors(model.config, model.blocks[-1].head_dim)
    return tensors | {name: LazyTensor.of(values) for name, values in factors.items()}


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


_CHANNEL_AXES = {
    **dict.fromkeys(("ffn_gate.weight", "ffn_gate.bias", "ffn_up.weight", "ffn_up.bias"), 0),
    "ffn_down.weight": 1,
}
"""Axis of channels in each tensor of a feed-forward."""


@dataclass
class _FileBlock:
    """Block of a file, with its tensors."""

    model: GgufModel
    architecture: Architecture
    index: int
    sizes: BlockSizes
    """Sizes in the file."""

    def tensors(self) -> Tensors:
        """Return the block's tensors, by llama.cpp's names inside a block.

        Raises:
            SecateurError: A stored tensor is missing, has another shape than config.json gives it, or has no place.
        """
        self.parts = self._collected()
        if self.model.blocks[self.index].heads:
            self._rescale_scores()
        else:
            self._keep_idle_head()
        if not self.sizes.experts:
            self._fill_channels(self.sizes.channels or 0)
        if self.architecture.needs_biases:
            for layer in self.model.layers:
                self.parts.setdefault(f"{layer}.bias", LazyTensor.full(self.parts[f"{layer}.weight"].shape[:1], 0.0))
        for name, layers in self.architecture.fused.items():
            for leaf in ("weight", "bias"):
                rows = [self.parts.pop(f"{layer}.{leaf}") for layer in layers if f"{layer}.{leaf}" in self.parts]
                if rows:
                    self.parts[f"{name}.{leaf}"] = LazyTensor.concatenated(rows)
        return self.parts

    def _collected(self) -> Tensors:
        """Return the block's tensors from the checkpoint, with llama.cpp's names and order of entries."""
        model = self.model
        layers, (experts, pieces) = layer_tensors(model, self.index), expert_tensors(model, self.index)
        narrowed = {f"{name}.{leaf}" for name in model.layers.values() for leaf in ("weight", "bias")}
        parts, own_names = layers | experts, dict.fromkeys([*layers, *experts], "")
        for name, stored in model.inside[self.index].items():
            # Parameters of an activation are metadata.
            if name in narrowed or stored in pieces or ".act_fn." in name:
                continue
            tensor = stored_tensor(model, stored)
            if split := split_of(name):
                parts |= {
                    place: tensor.then(split.part(number, model.config)) for number, place in enumerate(split.names)
                }
            else:
                whole = f"{model.family.blocks}.{self.index}.{name}"
                place = _place_of(model, self.architecture, whole).removeprefix(f"blk.{self.index}.")
                parts[place], own_names[place] = tensor, name
        for place, name in own_names.items():
            for change in changes_of(name, place, model.config, self.architecture):
                parts[place] = parts[place].then(change.write)
        return parts

    def _rescale_scores(self) -> None:
        """Multiply queries by the ratio between the model's scale of attention scores and llama.cpp's."""
        if (ratio := self.architecture.score_ratio(self.model, self.index)) == 1:
            return
        # A norm of queries would undo a factor on the query layer. So the factor goes into the norm, if there is one.
        for name in {"attn_q_norm.weight"} & self.parts.keys() or {"attn_q.weight", "attn_q.bias"} & self.parts.keys():
            self.parts[name] = self.parts[name].then(lambda values: values.float() * ratio)

    def _keep_idle_head(self) -> None:
        """Remove the attention if the architecture can do without it; otherwise add a head whose output is multiplied
        by zero."""
        hidden, dim = self.model.config.hidden_size, self.model.dim
        if not self.sizes.heads:
            self.parts = {name: tensor for name, tensor in self.parts.items() if not name.startswith("attn_")}
            return
        self.parts |= {f"{layer}.weight": LazyTensor.full((dim, hidden), 0.0) for layer in QKV}
        self.parts["attn_output.weight"] = LazyTensor.full((hidden, dim), 0.0)
        if self.architecture.head_norms:
            self.parts |= {f"attn_{letter}_norm.weight": LazyTensor.full((dim,), 1.0) for letter in "qk"}

    def _fill_channels(self, channels: int) -> None:
        """Add channels whose weights are zero to the feed-forward, up to the number in the file."""
        hidden = self.model.config.hidden_size
        empty = {"ffn_gate": (0, hidden), "ffn_up": (0, hidden), "ffn_down": (hidden, 0)}
        for layer, shape in empty.items():
            if layer in self.model.layers:
                self.parts.setdefault(f"{layer}.weight", LazyTensor.full(shape, 0.0))
        for name in _CHANNEL_AXES.keys() & self.parts.keys():
            self.parts[name] = self.parts[name].then(partial(_padded, axis=_CHANNEL_AXES[name], size=channels))


def _padded(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Return a vector or matrix with zeros added at the end of an axis, up to a size."""
    later = (0, 0) * (tensor.dim() - 1 - axis)
    return functional.pad(tensor, (*later, 0, size - tensor.shape[axis]))
