"""The layers of a block that pruning narrows, as parts of stored tensors, by llama.cpp's names inside a block.

The shapes of these tensors are known at once. Their values are computed when they are written, so that only one tensor
is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.gguf.model import QKV, BlockSizes, GgufModel


@dataclass(frozen=True)
class LazyTensor:
    """Tensor of a known shape whose values are computed on demand."""

    shape: tuple[int, ...]
    compute: Callable[[], Tensor]

    @staticmethod
    def of(tensor: Tensor) -> LazyTensor:
        """Return a lazy tensor of values that are in memory."""
        return LazyTensor(tuple(tensor.shape), lambda: tensor)

    @staticmethod
    def full(shape: tuple[int, ...], value: float) -> LazyTensor:
        """Return a tensor with one value everywhere."""
        return LazyTensor(shape, lambda: torch.full(shape, value))

    @staticmethod
    def concatenated(parts: Sequence[LazyTensor]) -> LazyTensor:
        """Return the rows of several tensors, one tensor after the other."""
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        return LazyTensor(shape, lambda: torch.cat([part.compute() for part in parts]))

    def then(self, change: Callable[[Tensor], Tensor]) -> LazyTensor:
        """Return the tensor after a change. The new shape is found by applying the change to a tensor without data."""
        shape = change(torch.empty(self.shape, device="meta")).shape
        return LazyTensor(tuple(shape), lambda: change(self.compute()))


Tensors = dict[str, LazyTensor]


def stored_tensor(model: GgufModel, stored: str) -> LazyTensor:
    """Return a tensor as the checkpoint stores it."""
    return LazyTensor(model.checkpoint.tensors[stored].shape, partial(model.checkpoint.read, stored))


def layer_tensors(model: GgufModel, index: int) -> Tensors:
    """Return the weights and biases of a block's query, key, value and output layers and of its feed-forward.

    Fused layers are split, and matrices are outputs x inputs.

    Raises:
        SecateurError: A tensor is missing, or has another shape than config.json gives it.
    """
    sizes, inside, tensors = model.blocks[index], model.inside[index], Tensors()
    for layer, name in model.layers.items():
        if not _has_layer(model, index, layer):
            continue
        for leaf, axes in (("weight", 2), ("bias", 1)):
            shape = _shape(model, sizes, layer)[:axes]
            if (stored := inside.get(f"{name}.{leaf}")) is not None:
                tensors[f"{layer}.{leaf}"] = _cut(model, sizes, layer, stored, shape)
            elif leaf == "weight" and 0 not in shape and not _may_lack(model, layer):
                raise SecateurError(f"{model.checkpoint.source}: block {index} has no {name}.weight; restore it")
    return tensors


def _has_layer(model: GgufModel, index: int, layer: str) -> bool:
    """Return whether a block has a layer. A block may have a token mixer instead of attention, or experts instead of a
    feed-forward."""
    if layer.startswith("ffn_"):
        return model.blocks[index].channels is not None
    return not model.is_token_mixer(index)


def _may_lack(model: GgufModel, layer: str) -> bool:
    """Return whether a layer's weights may be missing: in Gemma 4, blocks share keys, and values may be the keys."""
    return model.family.heads_by_layer_type and layer in ("attn_k", "attn_v")


def _shape(model: GgufModel, sizes: BlockSizes, layer: str) -> tuple[int, int]:
    """Return the numbers of outputs and inputs of a layer."""
    hidden, channels = model.config.hidden_size, sizes.channels or 0
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    return {
        "attn_q": (queries * (2 if model.source.query_gate else 1), hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, sizes.heads * sizes.value_dim),
        "ffn_gate": (channels, hidden),
        "ffn_up": (channels, hidden),
        "ffn_down": (hidden, channels),
    }[layer]


def _cut(model: GgufModel, sizes: BlockSizes, layer: str, stored: str, shape: tuple[int, ...]) -> LazyTensor:
    """Return a layer's part of a stored tensor.

    Raises:
        SecateurError: The part has another shape than config.json gives it.
    """
    tensor = stored_tensor(model, stored)
    if model.source.transposed and len(shape) == 2:
        tensor = tensor.then(torch.t)
    tensor = tensor.then(_part(model, sizes, layer, shape[0]))
    if tensor.shape != shape:
        raise SecateurError(
            f"{model.checkpoint.source}: {stored} gives {list(tensor.shape)} for {layer}, but config.json gives "
            f"{list(shape)}; find the config.json of these weights"
        )
    return tensor


def _part(model: GgufModel, sizes: BlockSizes, layer: str, rows: int) -> Callable[[Tensor], Tensor]:
    """Return the function that takes a layer's rows out of a stored tensor, which may hold several layers."""
    family, queries, keys = model.family, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    if layer in QKV and family.fused and family.interleaved:
        return partial(_of_groups, rows=_ROWS_OF_GROUP[layer], groups=sizes.kv_heads, dim=sizes.head_dim)
    starts = {"attn_q": 0, "attn_k": queries, "attn_v": queries + keys} if family.fused else {}
    starts |= {"ffn_gate": 0, "ffn_up": rows} if family.fused_gate else {}
    start = starts.get(layer)
    return lambda tensor: tensor if start is None else tensor[start : start + rows]


_ROWS_OF_GROUP = {"attn_q": slice(-2), "attn_k": slice(-2, -1), "attn_v": slice(-1, None)}
"""Heads of a KV group in an interleaved layer: all query heads, the key head, the value head."""


def _of_groups(tensor: Tensor, rows: slice, groups: int, dim: int) -> Tensor:
    """Return the rows of queries, keys or values of a layer that holds one KV group after the other."""
    return tensor.unflatten(0, (groups, -1, dim))[:, rows].flatten(0, 2)


def expert_tensors(model: GgufModel, index: int) -> tuple[Tensors, frozenset[str]]:
    """Return the matrices and biases of a block's experts, and the stored names of the tensors that contain them.

    Raises:
        SecateurError: A tensor is missing.
    """
    layout, checkpoint = model.family.experts, model.checkpoint
    if layout is None or not model.blocks[index].experts:
        return {}, frozenset()
    tensors, pieces = Tensors(), list[str]()
    for leaf, layers in {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.items():
        name = model.expert_parameter(index, leaf)
        if not (stored := checkpoint.pieces(name)):
            raise SecateurError(f"{checkpoint.source}: block {index} has no {name}; restore it")
        matrices = LazyTensor(checkpoint.parameter_shape(name), partial(checkpoint.read_parameter, name))
        kinds = {"weight": matrices.then(partial(torch.transpose, dim0=1, dim1=2)) if layout.inputs_first else matrices}
        pieces += stored
        if layout.alternating:
            pieces += (biases := checkpoint.pieces(f"{name}_bias"))
            kinds["bias"] = stored_tensor(model, biases[-1])
        for kind, tensor in kinds.items():
            for place, layer in enumerate(layers):
                tensors[f"ffn_{layer}_exps.{kind}"] = tensor.then(
                    partial(_layer_of_experts, place=place, layers=len(layers), alternating=layout.alternating)
                )
    return tensors, frozenset(pieces)


def _layer_of_experts(experts: Tensor, place: int, layers: int, alternating: bool) -> Tensor:
    """Return the rows of one of several layers in each expert's matrix: every nth row, or one range of rows."""
    rows = experts.shape[1] // layers
    return experts[:, place::layers] if alternating else experts[:, place * rows : (place + 1) * rows]
