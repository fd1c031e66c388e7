"""The weights of a GGUF file that secateur reads itself, written as a safetensors folder block by block.

The model class determines which tensors there must be. If the file lacks one of them, or has another one, the file is
refused before any weights are read.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur.base.errors import SecateurError
from secateur.checkpoints.config_file import empty_model
from secateur.checkpoints.weights import INDEX
from secateur.families.family import Experts
from secateur.families.registry import family_of
from secateur.gguf.architectures import ARCHITECTURES
from secateur.gguf.config import read_config
from secateur.gguf.file import GgufFile, Reading
from secateur.gguf.layout import Split, changes_of, gguf_name, split_of

Read = Callable[[torch.dtype], Iterator[tuple[str, Tensor]]]
"""Function of a dtype that yields the tensors in which a checkpoint stores one parameter, with their stored names."""


def folder_writer(reader: GGUFReader, reading: Reading, dtype: torch.dtype) -> Callable[[Path], None]:
    """Return a function that writes the model of a file into a folder, without the tokenizer.

    No weights are read before this function is called. It keeps one block in memory at a time, and one expert in
    float32.

    Args:
        reader: The open file.
        reading: The family whose entry is used to read it.
        dtype: Dtype of the weights to write; biases on the choice of experts are written as float32.

    Raises:
        SecateurError: A type of weights is not supported, or metadata or tensors do not fit the model's class.
    """
    file = GgufFile(reader, reading)
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
    sources = _Sources(file, config)
    in_block = re.compile(rf"{re.escape(sources.family.blocks)}\.(\d+)\.(.+)")
    shards: list[list[Read]] = [[] for _ in range(file.blocks + 1)]
    for name, parameter in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        match = in_block.fullmatch(name)
        block, inside = (int(match[1]), match[2]) if match else (-1, "")
        shards[block].append(sources.find(name, tuple(parameter.shape), block, inside))
    if unused := file.tensors.keys() - sources.used:
        raise SecateurError(f"{config.model_type} has no place for tensor {min(unused)}")
    return shards


class _Sources:
    """Tensors of a file that hold the parameters of a model.

    Attributes:
        used: Names of the tensors that were found.
    """

    def __init__(self, file: GgufFile, config: Any):
        """Begin without any used tensor."""
        self.file, self.config, self.family = file, config, family_of(config)
        self.used = set[str]()

    def find(self, name: str, shape: tuple[int, ...], block: int, inside: str) -> Read:
        """Return the function that reads a parameter.

        Args:
            name: transformers' name.
            shape: Shape in the model.
            block: Index of the parameter's block; -1 outside of blocks.
            inside: Name inside the block; empty outside of blocks.

        Raises:
            SecateurError: The file lacks a tensor, or has one of another shape.
        """
        experts, split = self.family.experts, split_of(inside)
        if experts and inside.startswith(f"{self.family.mixture}{experts.experts}."):
            return self._from_experts(experts, name, shape, block)
        # Older files hold one tensor, as checkpoints do.
        if split and f"blk.{block}.{split.names[0]}" in self.file.tensors:
            return self._from_two(split, name, shape, block)
        return self._from_one(name, shape)

    def _from_one(self, name: str, shape: tuple[int, ...]) -> Read:
        """Return the function that reads a parameter that is one tensor of the file."""
        file, stored = self.file, self._checkpoint_name(name)
        names = (gguf_name(file.architecture, file.blocks, one) for one in (stored, name))
        if (found := next(filter(None, names), None)) is None:
            raise SecateurError(f"GGUF has no place for {name}")
        self._use([found], file.shape(found), shape)
        changes = changes_of(name, found, self.config, ARCHITECTURES[file.architecture])

        def read(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
            tensor = file.read(found, torch.float32 if changes else dtype)
            for change in reversed(changes):
                tensor = change.read(tensor)
            yield stored, tensor.to(dtype if changes else tensor.dtype).reshape(shape).contiguous()

        return read

    def _from_two(self, split: Split, name: str, shape: tuple[int, ...], block: int) -> Read:
        """Return the function that reads a parameter that the file splits into two tensors."""
        file, config = self.file, self.config
        first, second = (f"blk.{block}.{part}" for part in split.names)
        empty = [torch.empty(file.shape(part), device="meta") for part in (first, second)]
        try:
            joined = split.read(empty[0], empty[1], config)
        except RuntimeError as error:
            raise SecateurError(
                f"tensors {first} and {second} do not have the sizes that its metadata state"
            ) from error
        self._use([first, second], tuple(joined.shape), shape)

        def read(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
            yield name, split.read(file.read(first, dtype), file.read(second, dtype), config)

        return read

    def _from_experts(self, experts: Experts, name: str, shape: tuple[int, ...], block: int) -> Read:
        """Return the function that reads a parameter of all experts of a block: matrices or biases."""
        file, (owner, _, leaf) = self.file, name.rpartition(".")
        kind = "bias" if leaf.endswith("_bias") else "weight"
        parts = dict(experts.stored)[leaf.removesuffix("_bias")]
        layers = ("gate", "up") if len(parts) == 2 else ("down",)
        names = [f"blk.{block}.ffn_{layer}_exps.{kind}" for layer in layers]
        fused = f"blk.{block}.ffn_gate_up_exps.{kind}"
        names = [fused] if fused in file.tensors and len(parts) == 2 else names
        shapes = [file.shape(one) for one in names]
        transposed = experts.inputs_first and kind == "weight"
        expected = (shape[0], *shape[:0:-1]) if transposed else shape
        self._use(names, (shapes[0][0], sum(one[1] for one in shapes), *shapes[0][2:]), expected)

        def read_parts(dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
            """Yield the parts of each expert."""
            for tensors in zip(*(file.experts(one, dtype) for one in names), strict=True):
                yield tensors if len(tensors) == len(parts) else tensors[0].chunk(len(parts))

        def read_stacked(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
            """Yield one tensor of all experts."""
            stack = torch.empty(shape, dtype=dtype)
            for place, tensors in zip(stack, read_parts(dtype), strict=True):
                # Alternating rows are the first row of each part, then the second ones.
                joined = torch.stack(tensors, 1).flatten(0, 1) if experts.alternating else torch.cat(tensors)
                place.copy_(joined.T if transposed else joined)
            yield self._checkpoint_name(name), stack

        def read_one_by_one(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
            """Yield the tensors of each expert."""
            for expert, tensors in enumerate(read_parts(dtype)):
                for part, tensor in zip(parts, tensors, strict=True):
                    yield self._checkpoint_name(f"{owner}.{expert}.{part}.weight"), tensor.clone()

        return read_stacked if experts.stacked else read_one_by_one

    def _use(self, names: list[str], found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        """Mark tensors as used. Raise `SecateurError` for another shape than the parameter's; dimensions of size 1 are
        ignored."""
        self.used.update(names)
        if [size for size in found if size != 1] != [size for size in expected if size != 1]:
            raise SecateurError(f"tensor {names[0]} has the shape {list(found)}, but the model needs {list(expected)}")

    def _checkpoint_name(self, name: str) -> str:
        """Return the name of a parameter in checkpoints."""
        for own, stored in self.file.reading.input.renamed:
            name = name.replace(own, stored, 1)
        return name
