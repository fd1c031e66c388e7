"""A GGUF file that secateur reads itself: its family, its metadata and its tensors.

Secateur reads files of most mixtures of experts, and files of dense models that transformers does not read. Facts that
such files do not state are in the family's entry (`GgufInput`).
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import ExpertGatingFuncType, GGUFReader, ReaderTensor
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.families.entry import Gguf, GgufInput
from secateur.families.registry import FAMILIES
from secateur.gguf.positions import FACTORS, layer_types

_PIECE = 2**26
"""Bytes of a file that are dequantised at once: the embedding of some models is larger than all their blocks."""
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_KEYS_AND_VALUES = ("attn_k.", "attn_v.", "attn_k_norm.")


class Reading(NamedTuple):
    """Family whose entry is used to read a file."""

    model_type: str
    gguf: Gguf
    input: GgufInput

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture of such files."""
        return self.gguf.architectures[0]

    @property
    def keys(self) -> dict[str, str]:
        """Metadata keys that files of the family must have, with the config keys of the same values."""
        return {**self.gguf.keys, **self.input.keys}

    @property
    def gating(self) -> ExpertGatingFuncType:
        """llama.cpp's number of the function from a router's logits to gates."""
        return ExpertGatingFuncType[str(self.gguf.gating).upper()]


@cache
def readings() -> tuple[Reading, ...]:
    """Return all families of which secateur itself reads GGUF files."""
    return tuple(
        Reading(name, entry.gguf, entry.gguf.input)
        for name, entry in FAMILIES.items()
        if entry.gguf.input is not None and entry.gguf.architectures
    )


def reading_of(reader: GGUFReader) -> Reading | None:
    """Return the family with which secateur itself reads a file; None if transformers reads it.

    Raises:
        SecateurError: Nobody reads mixtures of experts of the architecture.
    """
    architecture, metadata = architecture_of(reader), metadata_of(reader)
    known = [one for one in readings() if one.architecture == architecture]
    if not metadata.get("expert_count"):
        return next((one for one in known if one.input.dense), None)
    mixtures = [one for one in known if one.gguf.gating]
    if not mixtures:
        raise SecateurError(f"mixtures of experts of the architecture {architecture!r} are not read from GGUF")
    # Files of DeepSeek V3 may not state the function; a bias on the choice of experts distinguishes them from files of
    # DeepSeek V2.
    biased = any(".exp_probs_b." in tensor.name for tensor in reader.tensors)
    gating = metadata.get("expert_gating_func", None if biased else ExpertGatingFuncType.SOFTMAX)
    return next((one for one in mixtures if one.gating == gating), mixtures[-1])


def architecture_of(reader: GGUFReader) -> str:
    """Return llama.cpp's name of a file's architecture."""
    return str(reader.fields["general.architecture"].contents())


def metadata_of(reader: GGUFReader) -> dict[str, Any]:
    """Return the metadata of a file's architecture, by keys without its name."""
    start = f"{architecture_of(reader)}."
    return {key.removeprefix(start): field.contents() for key, field in reader.fields.items() if key.startswith(start)}


class GgufFile:
    """A file that secateur reads itself.

    Attributes:
        architecture: llama.cpp's name of the architecture.
        metadata: Metadata of the architecture, by keys without its name.
        reading: The family whose entry is used to read the file.
        blocks: Number of blocks, without the extra blocks at the end that predict later tokens (multi-token
            prediction).
        tensors: Tensors of these blocks, and tensors outside of blocks, by name.
    """

    def __init__(self, reader: GGUFReader, reading: Reading):
        """List the tensors without reading them.

        Raises:
            SecateurError: A type of weights is not supported, or the number of blocks is wrong.
        """
        self.reading, self.architecture = reading, reading.architecture
        self.metadata, self._fields = metadata_of(reader), reader.fields
        self.blocks = int(self.metadata["block_count"]) - int(self.metadata.get("nextn_predict_layers", 0))
        self.tensors: dict[str, ReaderTensor] = {
            tensor.name: tensor for tensor in reader.tensors if self._uses(tensor.name)
        }
        if not 0 < self.blocks <= len(self.tensors):
            raise SecateurError(
                f"its metadata state {self.blocks:,} blocks, but it holds {len(self.tensors):,} tensors"
            )
        for type in {tensor.tensor_type for tensor in self.tensors.values()}:
            try:
                gguf.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[type][1], dtype=np.uint8), type)
            except NotImplementedError as error:
                raise SecateurError(f"the gguf package does not read weights of the type {type.name}") from error

    def _uses(self, name: str) -> bool:
        """Return whether the model has the weights of a tensor."""
        if not (match := _BLOCK.match(name)):
            return name not in FACTORS
        # The last blocks may use the keys and values of earlier blocks; their own key and value tensors are then
        # unused.
        idle = match[2].startswith(_KEYS_AND_VALUES)
        return int(match[1]) < self.blocks - idle * self.metadata.get("attention.shared_kv_layers", 0)

    def common(self, key: str, default: Any = None) -> Any:
        """Return the number that all blocks have, or the list of numbers if blocks differ."""
        value = self.metadata.get(key, default)
        return value[0] if isinstance(value, list) and len(set(value)) == 1 else value

    def layer_types(self) -> list[str]:
        """Return the type of attention of each block; an empty list if the metadata do not state it."""
        return layer_types(self.metadata, self.blocks)

    def token_id(self, name: str) -> int | None:
        """Return the id of a special token; None if the file names none."""
        field = self._fields.get(f"tokenizer.ggml.{name}_token_id")
        return None if field is None else int(field.contents())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, outputs before inputs.

        Raises:
            SecateurError: The file has no such tensor.
        """
        if name not in self.tensors:
            raise SecateurError(f"tensor {name} is missing")
        # GGUF lists the fastest axis first.
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return the values of a tensor as a new tensor."""
        # Biases on the choice of experts stay float32, whatever the dtype of other weights.
        dtype = torch.float32 if ".exp_probs_b." in name else dtype
        return _dequantised(self.tensors[name].data, self.tensors[name], dtype).reshape(self.shape(name))

    def experts(self, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the values of a tensor expert by expert; one expert at a time is in float32."""
        stored, shape = self.tensors[name], self.shape(name)[1:]
        for expert in stored.data:
            yield _dequantised(expert, stored, dtype).reshape(shape)


def _dequantised(data: Any, stored: ReaderTensor, dtype: torch.dtype) -> Tensor:
    """Return the dequantised values of some data as a new vector. Only `_PIECE` bytes of the data are in float32 at a
    time."""
    block, size = gguf.GGML_QUANT_SIZES[stored.tensor_type]
    result, start = torch.empty(data.nbytes // size * block, dtype=dtype), 0
    for piece in np.array_split(data, min(len(data), 1 + data.nbytes // _PIECE)):
        values = torch.from_numpy(np.array(gguf.dequantize(piece, stored.tensor_type))).flatten()
        result[start : start + len(values)] = values
        start += len(values)
    return result
