"""Bytes that each module takes in a GGUF file, at each width."""

from copy import copy
from dataclasses import replace
from functools import cache

import torch

from secateur.base.errors import SecateurError
from secateur.formats.gguf_architecture import Architecture
from secateur.formats.gguf_architectures import LEVEL2
from secateur.formats.gguf_choice import choose, filled
from secateur.formats.gguf_model import GgufModel
from secateur.formats.gguf_tensors import block_entries, bytes_at, entries
from secateur.model.axes import ATTENTION, Width
from secateur.model.stream import BlockStream
from secateur.model.units.channels import CHANNELS
from secateur.plan.meters import Meter, added_biases, dense_widths, megabytes


def gguf_byte_meter(stream: BlockStream, type: str, biases: bool = False) -> Meter:
    """Return the meter of the bytes of all tensors in a GGUF file of a type, a name in `TYPES`.

    With `biases`, output projections of pruned blocks get one where they have none, unless a norm follows.

    Raises:
        SecateurError: no GGUF file can hold the dense model.
    """
    # Vectors are float32 there, whatever the type of the file.
    added = tuple(value * torch.float32.itemsize for value in added_biases(stream)) if biases else ()
    return replace(_tensor_meter(stream, type, any(added)), bias_sizes=added)


def _tensor_meter(stream: BlockStream, type: str, biases: bool) -> Meter:
    """Return the meter of all tensors but added biases; see `gguf_byte_meter`."""
    dense, checkpoint = dense_widths(stream), stream.checkpoint
    added: frozenset[str] = LEVEL2 if biases else frozenset()
    model = GgufModel(checkpoint, list(dense), added)
    try:
        # Blocks that differ may need another architecture, which can leave out more of a block without heads.
        without = [*dense[:-1], dense[-1] | stream.blocks[-1].attention.removed]
        architecture = choose(GgufModel(checkpoint, without, added), type)
    except SecateurError:
        architecture = choose(model, type)
    # One block stands for all of the same shape, but the first is a case of its own: it may have to keep a head.
    shapes = [block.shapes for block in stream.blocks]
    at = [shapes.index(own, min(index, 1)) for index, own in enumerate(shapes)]

    @cache
    def taken(index: int, kind: str, width: Width) -> int:
        return _gguf_meter(stream, model, architecture, type, index, kind, width)

    @cache
    def experts(index: int, width: Width) -> int:
        """Bytes of a block's mixture: its experts' matrices shrink along two axes, the router's along one."""
        full, total, times = dense[index], 0, stream.blocks[index].feed_forward.shared_multiple
        for entry in block_entries(model, architecture, index, type):
            shape = list(entry.tensor.shape)
            if ".ffn_" in entry.name or ".exp_" in entry.name:
                if times and "_shexp." in entry.name:
                    shape["ffn_down" in entry.name] = times * width.channels
                elif shape[0] == full.experts:
                    shape[0] = width.experts
                if len(shape) == 3:
                    shape[2 if ".ffn_down_exps" in entry.name else 1] = width.channels
                total += bytes_at(entry, tuple(shape), type)
        return total

    def module(index: int, kind: str, width: Width) -> float:
        full = dense[index]
        if stream.blocks[index].module(kind).role == ATTENTION:
            return taken(at[index], kind, full.taking(kind, width))
        if kind == "experts":
            return experts(at[index], full.taking("experts", width))
        # Rows are filled up, so a few channels fewer may be as large.
        channels = min(filled(width.channels, type), full.channels) if width.channels else 0
        return taken(at[index], kind, full | {CHANNELS: channels})

    whole = sum(entry.bytes for entry in entries(model, architecture, type))
    inside = sum(module(index, kind, width) for index, width in enumerate(dense) for kind in width.kinds)
    return Meter(dense, whole - inside, module, megabytes)


def _gguf_meter(
    stream: BlockStream, model: GgufModel, architecture: Architecture, type: str, index: int, kind: str, width: Width
) -> int:
    """Count the bytes of one module in a GGUF file, its norms included; only headers are made up, no tensor is read."""
    block, trial, tensors = stream.blocks[index], copy(model), dict(model.checkpoint.tensors)
    after, kept = block.shapes_at(width, kind), dict(model.inside[index])
    for name in block.inside(block.module(kind)):
        stored = stream.stored_name(index, name)
        if name in after:
            tensors[stored] = replace(tensors[stored], shape=after[name])
        else:
            del kept[name]
    trial.checkpoint = replace(model.checkpoint, tensors=tensors)
    trial.widths = [width if i == index else dense for i, dense in enumerate(model.widths)]
    trial.inside = [kept if i == index else inside for i, inside in enumerate(model.inside)]
    prefix = f"blk.{index}.{'attn' if kind == 'heads' else 'ffn'}_"
    return sum(e.bytes for e in block_entries(trial, architecture, index, type) if e.name.startswith(prefix))
