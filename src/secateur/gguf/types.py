"""Types of the numbers in a GGUF file, by the names that `--type` takes.

With `--type as-input`, tensors get the types that they had in the GGUF file that was pruned. Tensors that are the same
as in that file are copied from there byte by byte, and are not rounded twice.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor

from secateur.base.errors import SecateurError
from secateur.base.files import local_path
from secateur.checkpoints.checkpoint import Checkpoint
from secateur.gguf.llama_cpp import LLAMA_TYPES, check_quantises, library, quantised_rows
from secateur.write.record import original_model

AS_INPUT = "as-input"
"""Value of `--type` for the types that the tensors had in the GGUF file that was pruned."""


@dataclass(frozen=True)
class Storage:
    """Types of the tensors in a file of one type."""

    matrices: GGMLQuantizationType
    """Type of most matrices."""
    embeddings: GGMLQuantizationType
    """Type of the embedding and of the output matrix, whose rounding increases the loss most."""
    file: int
    """llama.cpp's number of the file's type."""

    @property
    def block(self) -> int:
        """Number of weights in one block of the type, by which the length of rows must be divisible."""
        return int(gguf.GGML_QUANT_SIZES[self.matrices][0])

    @property
    def bytes(self) -> float:
        """Bytes per weight of a matrix."""
        weights, size = gguf.GGML_QUANT_SIZES[self.matrices]
        return float(size / weights)

    def type_of(self, name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
        """Return the type of one tensor: vectors stay float32, and matrices whose rows do not fill blocks become
        float16.

        Args:
            name: llama.cpp's name.
            shape: Shape of the tensor.
        """
        inside = name.split(".", 2)[2] if name.startswith("blk.") else name
        if len(shape) == 1 or inside in _EXACT or name.endswith("_norm.weight"):
            return GGMLQuantizationType.F32
        if shape[-1] % self.block:
            return GGMLQuantizationType.F16
        return self.embeddings if name in _EMBEDDINGS else self.matrices

    def types_in(self, index: int) -> tuple[str, ...]:
        """Return the types in a block, if blocks with the same shapes may have different ones; here they may not."""
        return ()

    def data(self, name: str, values: np.ndarray[Any, Any], type: GGMLQuantizationType) -> np.ndarray[Any, Any]:
        """Return the bytes of a tensor in its type.

        Args:
            name: llama.cpp's name.
            values: The weights, float32 and contiguous.
            type: Result of `type_of`.

        Raises:
            SecateurError: A weight is too large for the type.
        """
        with np.errstate(over="ignore"):
            data = quantised_rows(values, type)
        if type == GGMLQuantizationType.F16 and not np.isfinite(data).all():
            raise SecateurError(f"tensor {name} has weights that are too large for f16; use bf16 or f32")
        return data


_EXACT = frozenset({"position_embd.weight", "ffn_gate_inp.weight", "shortconv.conv.weight", "ssm_conv1d.weight"})
"""Matrices that stay float32."""
_EMBEDDINGS = frozenset({"token_embd.weight", "per_layer_token_embd.weight", "output.weight"})
_T, _F = GGMLQuantizationType, gguf.LlamaFileType

TYPES: dict[str, Storage] = {
    "f32": Storage(_T.F32, _T.F32, _F.ALL_F32),
    "f16": Storage(_T.F16, _T.F16, _F.MOSTLY_F16),
    "bf16": Storage(_T.BF16, _T.BF16, _F.MOSTLY_BF16),
    "q8_0": Storage(_T.Q8_0, _T.Q8_0, _F.MOSTLY_Q8_0),
    "q4_0": Storage(_T.Q4_0, _T.Q8_0, _F.MOSTLY_Q4_0),
}
"""Types that can be written for every model, by name."""


def check_type(type: str) -> None:
    """Raise `SecateurError` for a type that cannot be written: an unknown one, or one that needs llama.cpp's library if
    that is not installed."""
    known = (*TYPES, *LLAMA_TYPES, AS_INPUT)
    if type in LLAMA_TYPES:
        library()
    if type in known:
        return
    if type.lower() in known:
        raise SecateurError(f"type is '{type}'; write it {type.lower()}")
    raise SecateurError(f"no type {type!r}; choose one of {', '.join(known)}")


_SMALLER_BLOCKS = {_T.Q4_K: _T.Q5_0, _T.Q5_K: _T.Q5_1, _T.Q6_K: _T.Q8_0}
"""Types with blocks of 32 weights that llama.cpp takes for rows which blocks of 256 weights do not fill."""


def bytes_per_weight(tensors: Collection[ReaderTensor]) -> float:
    """Return the bytes of the tensors of a file divided by the number of their weights."""
    return sum(int(one.n_bytes) for one in tensors) / sum(int(one.n_elements) for one in tensors)


def _filled_by(length: int, type: GGMLQuantizationType) -> GGMLQuantizationType:
    """Return the type, or a similar one whose blocks fill rows of a length."""
    while length % gguf.GGML_QUANT_SIZES[type][0]:
        type = _SMALLER_BLOCKS.get(type, _T.IQ4_NL if gguf.GGML_QUANT_SIZES[type][0] > 32 else _T.F16)
    return type


class LlamaStorage(Storage):
    """Types of the tensors in a file that llama.cpp's library makes, for an estimate of its size: the library gives
    some tensors a larger type."""

    @property
    def block(self) -> int:
        """Number of weights by which the length of rows must be divisible: any length is possible."""
        return 1

    def type_of(self, name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
        """Return the type of one tensor, or a similar one whose blocks fill its rows."""
        return _filled_by(shape[-1], super().type_of(name, shape))


@dataclass(frozen=True)
class InputStorage(Storage):
    """Types of the tensors in a GGUF file that was pruned."""

    tensors: Mapping[str, ReaderTensor] = field(default_factory=dict)
    """Tensors of the file, by llama.cpp's names."""
    dtype: torch.dtype = torch.bfloat16
    """Dtype to which the weights of the file were dequantised."""

    @property
    def block(self) -> int:
        """Number of weights by which the length of rows is divisible: the size of the smallest blocks."""
        return min(32, int(gguf.GGML_QUANT_SIZES[self.matrices][0]))

    @property
    def bytes(self) -> float:
        """Bytes per weight of the file."""
        return bytes_per_weight(self.tensors.values())

    def type_of(self, name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
        """Return the type of one tensor, or a similar one whose blocks fill its rows."""
        if name not in self.tensors:
            return TYPES["f16"].type_of(name, shape)
        return _filled_by(shape[-1], self.tensors[name].tensor_type)

    def types_in(self, index: int) -> tuple[str, ...]:
        """Return the types of the tensors in a block."""
        inside = (tensor for name, tensor in self.tensors.items() if name.startswith(f"blk.{index}."))
        return tuple(tensor.tensor_type.name for tensor in inside)

    def data(self, name: str, values: np.ndarray[Any, Any], type: GGMLQuantizationType) -> np.ndarray[Any, Any]:
        """Return a tensor's bytes, copied from the file if its weights are the same up to the rounding of `dtype`."""
        before = self.tensors.get(name)
        if before is not None and list(reversed(before.shape)) == list(values.shape):
            then = np.array(gguf.quants.dequantize(before.data, before.tensor_type), np.float32).reshape(values.shape)
            if torch.equal(torch.from_numpy(then).to(self.dtype), torch.from_numpy(values).to(self.dtype)):
                return np.asarray(before.data)
        return super().data(name, values, type)


def storage_of(type: str, checkpoint: Checkpoint) -> Storage:
    """Return the types of the tensors in a file of a type.

    Args:
        type: Value of `--type`.
        checkpoint: The model to write, or to prune.

    Raises:
        SecateurError: The file that was pruned is not there, is broken, or has a type that cannot be made.
    """
    if type in LLAMA_TYPES:
        return LlamaStorage(LLAMA_TYPES[type], _T.Q6_K, 0)
    if type != AS_INPUT:
        return TYPES[type]
    file = _input_file(checkpoint)
    return _input_storage(file, file.stat().st_mtime_ns, checkpoint.dtype)


def _input_file(checkpoint: Checkpoint) -> Path:
    """Return the GGUF file that is pruned, or from which a folder was pruned.

    Raises:
        SecateurError: There is no such file.
    """
    own = checkpoint.source if checkpoint.source.endswith(".gguf") else None
    source = own or original_model(checkpoint.path)
    if source is None or not source.endswith(".gguf"):
        raise SecateurError(
            f"{checkpoint.source}: type {AS_INPUT} is for models that are pruned from a .gguf file, and this one comes "
            f"from {source or 'no such file'}; choose another type"
        )
    if not (file := local_path(source)).is_file():
        raise SecateurError(
            f"{checkpoint.source}: type {AS_INPUT} reads the types from the file that was pruned, but {source} is not "
            "there; put it back, run in the folder where it was pruned, or choose another type"
        )
    return file


@cache
def _input_storage(file: Path, _: int, dtype: torch.dtype) -> InputStorage:
    """Return the types in a file; the second argument is the time of its last change, which the cache compares.

    Raises:
        SecateurError: The file is broken, or has a type that cannot be made.
    """
    try:
        reader = GGUFReader(file)
        number = int(reader.fields["general.file_type"].contents())
    except Exception as error:
        # The reader maps the file into memory, and fails in many ways when something is missing.
        raise SecateurError(f"{file}: truncated or broken GGUF; restore it, or choose another type") from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, tensor in tensors.items():
        try:
            check_quantises(tensor.tensor_type)
        except SecateurError as error:
            raise SecateurError(f"{file}: {name} is {tensor.tensor_type.name.lower()}: {error}") from error
    inside = [
        tensor.tensor_type for name, tensor in tensors.items() if name.startswith("blk.") and len(tensor.shape) > 1
    ]
    most = max(inside, key=inside.count, default=_T.F32)
    return InputStorage(most, most, number, tensors, dtype)
