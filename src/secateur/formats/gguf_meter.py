"""The byte meter of GGUF files: bytes that each module takes at each width."""

from copy import copy
from dataclasses import replace
from functools import cache

import torch

from secateur.base.errors import SecateurError
from secateur.formats.gguf_architecture import Architecture
from secateur.formats.gguf_architectures import OUTPUT_LAYERS
from secateur.formats.gguf_choice import choose_architecture
from secateur.formats.gguf_model import GgufModel
from secateur.formats.gguf_sizes import filled
from secateur.formats.gguf_tensors import block_tensors, bytes_of, file_tensors
from secateur.model.axes import ATTENTION, FEED_FORWARD, Width
from secateur.model.stream import BlockStream
from secateur.model.units.channels import CHANNELS
from secateur.model.units.experts import EXPERT_CHANNELS, EXPERTS
from secateur.plan.meters import Meter, added_biases, dense_widths, megabytes

_PREFIXES = {ATTENTION: ("attn_",), FEED_FORWARD: ("ffn_", "exp_")}
"""Beginnings of the names of a module's tensors, by its role."""


def gguf_byte_meter(stream: BlockStream, type: str, biases: bool = False) -> Meter:
    """Return the meter of the bytes of all tensors in a GGUF file.

    Args:
        stream: The dense model.
        type: Type of the file.
        biases: The recovery adds biases to output projections that have none, unless a norm follows.

    Raises:
        SecateurError: No GGUF file can hold the dense model.
    """
    # Vectors are float32 in files of every type.
    added = tuple(entries * torch.float32.itemsize for entries in added_biases(stream)) if biases else ()
    bytes_at, dense = _ModuleBytes(stream, type, OUTPUT_LAYERS if any(added) else frozenset()), dense_widths(stream)
    total, original = (
        sum(tensor.bytes for tensor in file_tensors(model, bytes_at.architecture))
        for model in (bytes_at.model, bytes_at.original)
    )
    modules = sum(bytes_at(index, kind, width) for index, width in enumerate(dense) for kind in width.kinds)
    return Meter(dense, total - modules, bytes_at, megabytes, added, original - total)


class _ModuleBytes:
    """Bytes that a module takes in a file at a width, computed from headers alone."""

    def __init__(self, stream: BlockStream, type: str, added: frozenset[str]):
        self.stream = stream
        self.dense = dense_widths(stream)
        self.model = GgufModel(stream.checkpoint, self.dense, added, type)
        self.original = GgufModel(stream.checkpoint.original, self.dense, added, type)
        self.architecture = self._architecture(added)
        # Blocks of the same shapes have the same number of bytes, except for the first block, which may have to keep an
        # idle head.
        shapes = [(block.shapes, self.model.storage.types_in(index)) for index, block in enumerate(stream.blocks)]
        self.same = [shapes.index(own, min(index, 1)) for index, own in enumerate(shapes)]
        self._bytes = cache(self._module_bytes)

    def _architecture(self, added: frozenset[str]) -> Architecture:
        """Return the architecture of the pruned file.

        Raises:
            SecateurError: No architecture computes the dense model.
        """
        # If there is an architecture that can leave out the attention of a block without heads, the pruned file gets
        # this one.
        headless = [*self.dense[:-1], self.dense[-1] | self.stream.blocks[-1].attention.removed]
        try:
            return choose_architecture(GgufModel(self.stream.checkpoint, headless, added, self.model.type))
        except SecateurError:
            return choose_architecture(self.model)

    def __call__(self, index: int, kind: str, width: Width) -> float:
        """Return the bytes of one module of a block, by the kind of its units."""
        module, dense, same = self.stream.blocks[index].module(kind), self.dense[index], self.same[index]
        kept = {axis: width[axis] for axis in module.removed}
        if kept.get(CHANNELS):
            # Rows are filled up, so that slightly different numbers of channels take the same bytes.
            kept = {CHANNELS: min(filled(width[CHANNELS], self.model.storage.block), dense[CHANNELS])}
        return self._bytes(same, kind, dense | kept)

    def _module_bytes(self, index: int, kind: str, width: Width) -> int:
        """Return the bytes of a module of a block; the result holds for all blocks of the same shapes."""
        return self._expert_bytes(index, width) if kind == "experts" else self._narrowed_bytes(index, kind, width)

    def _expert_bytes(self, index: int, width: Width) -> int:
        """Return the bytes of a mixture. Pruning narrows matrices of experts along two axes, and the router along
        one."""
        shared = self.stream.blocks[index].feed_forward.shared_multiple * width[EXPERT_CHANNELS]
        total = 0
        for tensor in block_tensors(self.model, self.architecture, index):
            name = tensor.name.split(".", 2)[2]
            if name.startswith(_PREFIXES[FEED_FORWARD]):
                shape = _expert_shape(name, tensor.values.shape, self.dense[index][EXPERTS], width, shared)
                total += bytes_of(shape, self.model.storage.type_of(tensor.name, shape))
        return total

    def _narrowed_bytes(self, index: int, kind: str, width: Width) -> int:
        """Return the bytes of an attention or a feed-forward, its norms included."""
        block, model, tensors = self.stream.blocks[index], copy(self.model), dict(self.model.checkpoint.tensors)
        after, inside = block.shapes_at(width, kind), dict(self.model.inside[index])
        for name in block.inside(block.module(kind)):
            stored = self.stream.stored_name(index, name)
            if name in after:
                tensors[stored] = replace(tensors[stored], shape=after[name])
            else:
                del inside[name]
        model.checkpoint = replace(self.model.checkpoint, tensors=tensors)
        model.inside = [*model.inside[:index], inside, *model.inside[index + 1 :]]
        model.blocks = [*model.blocks[:index], model.sizes(index, width), *model.blocks[index + 1 :]]
        tensors_of_block = block_tensors(model, self.architecture, index)
        prefixes = tuple(f"blk.{index}.{prefix}" for prefix in _PREFIXES[block.module(kind).role])
        return sum(tensor.bytes for tensor in tensors_of_block if tensor.name.startswith(prefixes))


def _expert_shape(name: str, shape: tuple[int, ...], experts: int, width: Width, shared: int) -> tuple[int, ...]:
    """Return the shape of a tensor of a mixture at a width.

    Args:
        name: llama.cpp's name inside a block.
        shape: Dense shape.
        experts: Number of experts of the dense block.
        width: The block's width.
        shared: Channels of the shared expert at that width; 0 if it keeps all channels.
    """
    kept, is_down = list(shape), name.startswith("ffn_down_")
    if shared and "_shexp." in name:
        kept[int(is_down)] = shared
    elif kept[0] == experts:
        kept[0] = width[EXPERTS]
    if len(kept) == 3:
        kept[2 if is_down else 1] = width[EXPERT_CHANNELS]
    return tuple(kept)
