"""The weights of a GGUF file that secateur reads itself, written as a safetensors folder block by block.

The model class determines which tensors there must be. If the file lacks one of them, or has another one, the file is
refused before any weights are read.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gguf import GGUFReader
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur.base.errors import SecateurError
from secateur.checkpoints.config_file import empty_model
from secateur.checkpoints.weights import INDEX
from secateur.families.entry import Experts, Family
from secateur.families.registry import family_of
from secateur.gguf.architectures import ARCHITECTURES
from secateur.gguf.config import read_config
from secateur.gguf.file import GgufFile
from secateur.gguf.layout import Split, changes_of, gguf_name, split_of

Read = Callable[[torch.dtype], Iterator[tuple[str, Tensor]]]
"""Function of a dtype that yields the tensors in which a checkpoint stores one parameter, with their stored names."""


class Source(NamedTuple):
    """Tensors of a file that hold one parameter of the model."""

    names: Sequence[str]
    """Names of the tensors in the file."""
    read: Read


def folder_writer(reader: GGUFReader, dtype: torch.dtype) -> Callable[[Path], None]:
    """Return a function that writes the model of a file into a folder, without the tokenizer.

    No weights are read before this function is called. It keeps one block in memory at a time, and one expert in
    float32.

    Args:
        reader: The open file.
        dtype: Dtype of the weights to write; biases on the choice of experts are written as float32.

    Raises:
        SecateurError: The architecture is not supported, or metadata or tensors do not fit the model's class.
    """
    file = GgufFile(reader)
    config = read_config(file, reader)
    return partial(_write, config, _shards(file, config), dtype)


def _write(config: Any, shards: Sequence[Sequence[Read]], dtype: torch.dtype, folder: Path) -> None:
    """Write weights, index and config.json into a folder that exists."""
    shard_of, total = dict[str, str](), 0
    for number, reads in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {stored: value for read in reads for stored, value in read(dtype)}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        shard_of |= dict.fromkeys(tensors, name)
        total += sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": shard_of}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    config.dtype = dtype
    config.save_pretrained(folder)


def _shards(file: GgufFile, config: Any) -> list[list[Read]]:
    """Return the functions that read the tensors of each shard: one shard for each block, then one for all other
    tensors.

    Raises:
        SecateurError: Tensors are missing, left over, or have other shapes than the model's class gives them.
    """
    model = empty_model(AutoModelForCausalLM, config)
    config.architectures = [type(model).__name__]
    family = family_of(config)
    in_block = re.compile(rf"{re.escape(family.blocks)}\.(\d+)\.(.+)")
    shards: list[list[Read]] = [[] for _ in range(file.blocks + 1)]
    used = set[str]()
    for name, parameter in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        match = in_block.fullmatch(name)
        block, inside = (int(match[1]), match[2]) if match else (-1, "")
        source = _Parameter(file, config, family, name, tuple(parameter.shape), block, inside).source()
        used.update(source.names)
        shards[block].append(source.read)
    if unused := file.tensors.keys() - used:
        raise SecateurError(f"{config.model_type} has no place for tensor {min(unused)}")
    return shards


@dataclass(frozen=True)
class _Parameter:
    """Parameter of the model that is to be read from a file."""

    file: GgufFile
    config: Any
    family: Family
    name: str
    """transformers' name."""
    shape: tuple[int, ...]
    block: int
    """Index of the parameter's block; -1 outside of blocks."""
    inside: str
    """Name inside the block; empty outside of blocks."""

    @property
    def stored(self) -> str:
        """Name in checkpoints."""
        return _stored_name(self.family.experts, self.name)

    def source(self) -> Source:
        """Return the tensors of the file that hold the parameter, and how to read them.

        Raises:
            SecateurError: The file lacks a tensor, or has one of another shape.
        """
        experts, split = self.family.experts, split_of(self.inside)
        if experts and self.inside.startswith(f"{self.family.mixture}{experts.experts}."):
            return self._from_experts(experts)
        # Older files hold one tensor, as checkpoints do.
        if split and f"blk.{self.block}.{split.names[0]}" in self.file.tensors:
            return self._from_two(split)
        return self._from_one()

    def _from_one(self) -> Source:
        """Return the source of a parameter that is one tensor of the file."""
        names = (gguf_name(self.file.architecture, self.file.blocks, name) for name in (self.stored, self.name))
        if (found := next(filter(None, names), None)) is None:
            raise SecateurError(f"GGUF has no place for {self.name}")
        self._check(found, self.file.shape(found), self.shape)
        changes = changes_of(self.name, found, self.config, ARCHITECTURES[self.file.architecture])

        def read(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
            tensor = self.file.read(found, torch.float32 if changes else dtype)
            for change in reversed(changes):
                tensor = change.read(tensor)
            yield self.stored, tensor.to(dtype if changes else tensor.dtype).reshape(self.shape).contiguous()

        return Source([found], read)

    def _from_two(self, split: Split) -> Source:
        """Return the source of a parameter that the file splits into two tensors."""
        first, second = names = [f"blk.{self.block}.{name}" for name in split.names]
        empty = [torch.empty(self.file.shape(name), device="meta") for name in names]
        try:
            joined = split.read(empty[0], empty[1], self.config)
        except RuntimeError as error:
            raise SecateurError(
                f"tensors {first} and {second} do not have the sizes that its metadata state"
            ) from error
        self._check(first, tuple(joined.shape), self.shape)

        def read(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
            yield self.name, split.read(self.file.read(first, dtype), self.file.read(second, dtype), self.config)

        return Source(names, read)

    def _from_experts(self, experts: Experts) -> Source:
        """Return the source of a parameter of all experts of a block: matrices or biases."""
        owner, _, leaf = self.name.rpartition(".")
        kind = "bias" if leaf.endswith("_bias") else "weight"
        parts = dict(experts.stored)[leaf.removesuffix("_bias")]
        names = [f"blk.{self.block}.ffn_{part}_exps.{kind}" for part in _EXPERT_PARTS[len(parts)]]
        fused = f"blk.{self.block}.ffn_gate_up_exps.{kind}"
        names = [fused] if fused in self.file.tensors and len(parts) == 2 else names
        shapes = [self.file.shape(name) for name in names]
        transposed = experts.inputs_first and kind == "weight"
        expected = (self.shape[0], *self.shape[:0:-1]) if transposed else self.shape
        self._check(names[0], (shapes[0][0], sum(shape[1] for shape in shapes), *shapes[0][2:]), expected)

        def read_parts(dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
            """Yield the parts of each expert."""
            for tensors in zip(*(self.file.experts(name, dtype) for name in names), strict=True):
                yield tensors if len(tensors) == len(parts) else tensors[0].chunk(len(parts))

        def read_stacked(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
            """Yield one tensor of all experts."""
            stack = torch.empty(self.shape, dtype=dtype)
            for place, tensors in zip(stack, read_parts(dtype), strict=True):
                # Alternating rows are the first row of each part, then the second ones.
                joined = torch.stack(tensors, 1).flatten(0, 1) if experts.alternating else torch.cat(tensors)
                place.copy_(joined.T if transposed else joined)
            yield self.stored, stack

        def read_one_by_one(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
            """Yield the tensors of each expert."""
            for expert, tensors in enumerate(read_parts(dtype)):
                for part, tensor in zip(parts, tensors, strict=True):
                    yield _stored_name(experts, f"{owner}.{expert}.{part}.weight"), tensor.clone()

        return Source(names, read_stacked if experts.stacked else read_one_by_one)

    def _check(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        """Raise `SecateurError` for a tensor of another shape than its parameter; dimensions of size 1 are ignored."""
        if [size for size in found if size != 1] != [size for size in expected if size != 1]:
            raise SecateurError(f"tensor {name} has the shape {list(found)}, but the model needs {list(expected)}")


_EXPERT_PARTS = {1: ("down",), 2: ("gate", "up")}
"""llama.cpp's names of experts' layers, by the number of layers that a checkpoint's tensor holds."""


def _stored_name(experts: Experts | None, name: str) -> str:
    """Return the name of a parameter in checkpoints."""
    for own, stored in experts.renamed if experts else ():
        name = name.replace(own, stored, 1)
    return name
