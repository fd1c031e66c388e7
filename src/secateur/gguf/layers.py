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

from secateur.gguf.model import QKV, GgufModel


@dataclass(frozen=True)
class LazyTensor:
    """Tensor of a known shape whose values are computed on demand."""

    shape: tuple[int, ...]
    compute: Callable[[], Tensor]

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
    return LazyTensor(model.shape_of(stored), partial(model.checkpoint.read, stored))


def layer_tensors(model: GgufModel, index: int) -> Tensors:
    """Return the weights and biases of a block's query, key, value and output layers and of its feed-forward.

    Fused layers are split, and matrices are outputs x inputs. A block with a token mixer or with experts lacks layers.
    In Gemma 4, blocks share keys, and values may be the keys.
    """
    tensors = Tensors()
    for layer, name in model.layers.items():
        for leaf in ("weight", "bias"):
            if (stored := model.inside[index].get(f"{name}.{leaf}")) is not None:
                tensor = stored_tensor(model, stored)
                if model.source.transposed and leaf == "weight":
                    tensor = tensor.then(torch.t)
                tensors[f"{layer}.{leaf}"] = tensor.then(_part(model, index, layer))
    return tensors


def _part(model: GgufModel, index: int, layer: str) -> Callable[[Tensor], Tensor]:
    """Return the function that takes a layer's rows out of a stored tensor, which may hold several layers."""
    sizes, family = model.blocks[index], model.family
    if layer in QKV and family.fused and family.interleaved:
        # The tensor holds one KV group after the other: all query heads, the key head, the value head.
        of_group = {"attn_q": slice(-2), "attn_k": slice(-2, -1), "attn_v": slice(-1, None)}[layer]
        return lambda tensor: tensor.unflatten(0, (sizes.kv_heads, -1, sizes.head_dim))[:, of_group].flatten(0, 2)
    rows = dict[str, slice]()
    if family.fused:
        queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        rows |= {
            "attn_q": slice(queries),
            "attn_k": slice(queries, queries + keys),
            "attn_v": slice(queries + keys, None),
        }
    if family.fused_gate:
        rows |= {"ffn_gate": slice(sizes.channels), "ffn_up": slice(sizes.channels, None)}
    return lambda tensor: tensor[rows.get(layer, slice(None))]


def expert_tensors(model: GgufModel, index: int) -> tuple[Tensors, frozenset[str]]:
    """Return the matrices and biases of a block's experts, and the stored names of the tensors that contain them."""
    layout, checkpoint = model.family.experts, model.checkpoint
    if layout is None or not model.blocks[index].experts:
        return {}, frozenset()
    tensors, pieces = Tensors(), list[str]()
    for leaf, layers in {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.items():
        name = f"{model.family.blocks}.{index}.{model.family.mixture}{layout.experts}.{leaf}"
        pieces += checkpoint.pieces(name)
        shape = model.shapes.get(name) or checkpoint.parameter(name).shape
        matrices = LazyTensor(shape, checkpoint.parameter(name).read)
        kinds = {"weight": matrices.then(partial(torch.transpose, dim0=1, dim1=2)) if layout.inputs_first else matrices}
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
