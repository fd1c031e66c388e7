"""The format `gguf`: one file for llama.cpp, and the bytes that each module takes in it at each width."""

from collections.abc import Mapping
from copy import copy
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from gguf import GGML_QUANT_SIZES

from secateur.base.errors import SecateurError
from secateur.base.names import FORMATS
from secateur.base.output import Output
from secateur.formats.converted import Converted
from secateur.formats.format import Loading, PrunedModel
from secateur.gguf.architectures import OUTPUT_LAYERS, choose_architecture, gguf_unsupported
from secateur.gguf.export import convert
from secateur.gguf.importance import measured
from secateur.gguf.llama_cpp import LLAMA_TYPES
from secateur.gguf.model import STATED_AXES, GgufModel, filled
from secateur.gguf.tensors import block_tensors, file_tensors
from secateur.gguf.tokenizer import vocabulary_of
from secateur.gguf.types import check_type, storage_of
from secateur.model.axes import ATTENTION, FEED_FORWARD, Width, axis_kinds
from secateur.model.stream import BlockStream
from secateur.model.units.channels import CHANNELS
from secateur.model.units.heads import HEADS
from secateur.plan.meters import Meter, added_biases, cache_meter, dense_widths, megabytes

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
        # An architecture that can leave out the attention of a block without heads is better than one that cannot.
        headless = [*self.dense[:-1], self.dense[-1] | dict.fromkeys(self.dense[-1].keys() & set(HEADS), 0)]
        try:
            self.architecture = choose_architecture(GgufModel(stream.checkpoint, headless, added, type))
        except SecateurError:
            self.architecture = choose_architecture(self.model)
        # Blocks of the same shapes have the same number of bytes, except for the first block, which may have to keep an
        # idle head.
        shapes = [(block.shapes, self.model.storage.types_in(index)) for index, block in enumerate(stream.blocks)]
        self.same = [shapes.index(own, min(index, 1)) for index, own in enumerate(shapes)]
        self._bytes = cache(self._module_bytes)

    def __call__(self, index: int, kind: str, width: Width) -> float:
        """Return the bytes of one module of a block, by the kind of its units."""
        module, dense, same = self.stream.blocks[index].module(kind), self.dense[index], self.same[index]
        kept = {axis: width[axis] for axis in module.removed}
        if kept.get(CHANNELS):
            # Rows are filled up, so that slightly different numbers of channels take the same bytes.
            kept = {CHANNELS: min(filled(width[CHANNELS], self.model.storage.block), dense[CHANNELS])}
        return self._bytes(same, kind, dense | kept)

    def _module_bytes(self, index: int, kind: str, width: Width) -> int:
        """Return the bytes of a module of a block, its norms included; the result holds for all blocks of the same
        shapes."""
        block, model = self.stream.blocks[index], copy(self.model)
        after, inside = block.shapes_at(width, kind), dict(self.model.inside[index])
        model.shapes = {}
        for name in block.inside(block.module(kind)):
            if name in after:
                whole = f"{model.family.blocks}.{index}.{name}"
                model.shapes |= dict.fromkeys((whole, *self.stream.pieces(index, name)), after[name])
            else:
                del inside[name]
        model.inside = [*model.inside[:index], inside, *model.inside[index + 1 :]]
        model.blocks = [*model.blocks[:index], model.sizes(index, width), *model.blocks[index + 1 :]]
        tensors_of_block = block_tensors(model, self.architecture, index)
        prefixes = tuple(f"blk.{index}.{prefix}" for prefix in _PREFIXES[block.module(kind).role])
        return sum(tensor.bytes for tensor in tensors_of_block if tensor.name.startswith(prefixes))


class GgufFormat(Converted):
    """GGUF file. Blocks may differ in width if llama.cpp's architecture allows it; otherwise all have one width."""

    declaration = FORMATS["gguf"]
    other_kernels = "llama.cpp"

    @classmethod
    def check_type(cls, type: str) -> None:
        """Raise `SecateurError` for a type that cannot be written here."""
        check_type(type)

    @classmethod
    def how_to_load(cls, auto_class: str, path: str) -> Loading:
        """Return the command of llama.cpp."""
        return Loading(f"Run it: llama-cli -m {path}")

    @property
    def file_bytes(self) -> int:
        """Approximate bytes of the dense model's weights in the file."""
        checkpoint = self.stream.checkpoint
        # A file in the dtype of the folder is written before llama.cpp's library makes another of it.
        before = checkpoint.bytes if self.type in LLAMA_TYPES else 0
        return before + int(checkpoint.bytes / checkpoint.dtype.itemsize * storage_of(self.type, checkpoint).bytes)

    @property
    def row_multiple(self) -> int:
        """Number of weights in a block of a K or I type; else 1."""
        return int(GGML_QUANT_SIZES[LLAMA_TYPES[self.type]][0]) if self.type in LLAMA_TYPES else 1

    def unsupported_reason(self, width: Width) -> str | None:
        """Return why the file cannot hold one block of this width (with uniform widths: all pruned blocks); None if it
        can."""
        if (reason := super().unsupported_reason(width)) is not None:
            return reason
        blocks = self.stream.blocks
        first = next((i for i in self.block_range if blocks[i].loses_heads), self.block_range.start)
        return self._unsupported(dict.fromkeys(self.block_range if self.same_width else [first], width))

    def unsupported_plan(self, widths: Mapping[int, Width]) -> str | None:
        """Return why the file cannot hold blocks of these widths; None if it can."""
        return super().unsupported_plan(widths) or self._unsupported(widths)

    def _unsupported(self, widths: Mapping[int, Width]) -> str | None:
        """Return why no architecture computes the model with these widths; blocks without a width are dense."""
        dense = [block.width for block in self.stream.blocks]
        # With uniform widths, a block that lacks a module would seem to have it.
        every = [widths.get(index, width) if len(width.kinds) > 1 else width for index, width in enumerate(dense)]
        for width, before in zip(every, dense, strict=True):
            narrowed = {axis for axis, number in width.items() if number != before.get(axis, number)}
            if unstated := narrowed - STATED_AXES:
                return f"GGUF files do not state numbers of {axis_kinds()[min(unstated)].label}; take --format hf"
        added = self.biases and any(added_biases(self.stream))
        return gguf_unsupported(self.stream.checkpoint, every, self.type, biases=added)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise `SecateurError` for a tokenizer that GGUF cannot hold."""
        vocabulary_of(tokenizer, self.stream.checkpoint.config.vocab_size)

    def check_range(self) -> None:
        """Raise `SecateurError` for weights beyond the range of float16, if the folder or the file is stored as
        float16."""
        if self.dtype == torch.float16 or self.type == "f16":
            self.stream.checkpoint.check_range(torch.float16)

    def cache_meter(self) -> Meter:
        """Return the meter of llama.cpp's KV cache, which is float16 for every type of tensors."""
        return cache_meter(self.stream, torch.float16)

    def byte_meter(self) -> Meter:
        """Return the meter of the bytes of tensors, without the tokenizer; an estimate for a type of llama.cpp's
        library."""
        return gguf_byte_meter(self.stream, self.type, self.biases)

    def target_meter(self) -> Meter:
        """Return the meter of the bytes of tensors.

        Raises:
            SecateurError: The bytes are only an estimate.
        """
        if self.type in LLAMA_TYPES:
            raise SecateurError(
                f"the bytes of type {self.type} are known only when llama.cpp has chosen the type of each tensor; give "
                "--sparsity or --target params=N instead, or take another --type"
            )
        return self.byte_meter()

    def convert(self, folder: Path, output: Output, pruned: PrunedModel) -> int:
        """Convert the folder as `secateur export` does, with importances of the calibration rows, and return the bytes
        of its weights."""
        options: dict[str, Any] = {"overwrite": output.overwrite, "watcher": pruned.watcher, "at": output.resume_path}
        if pruned.rows is not None and self.type in LLAMA_TYPES:
            options["importance"] = partial(measured, rows=pruned.rows, device=str(self.stream.device))
        return convert(folder, output.path, type=self.type, **options).bytes
