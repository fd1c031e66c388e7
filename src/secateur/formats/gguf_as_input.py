"""`--type as-input`: a GGUF file whose tensors have the types of the GGUF file that was pruned.

The folder is first converted to a file that holds its weights exactly. Tensors that are the same as in the input are
then copied from there byte by byte, and all others are converted to the types that they had.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, ReaderTensor

from secateur.base.errors import SecateurError
from secateur.base.files import local_path
from secateur.base.progress import Watcher
from secateur.formats.llama_cpp import quantised_rows
from secateur.write.record import original_model

AS_INPUT = "as-input"
"""Value of `--type`."""

_T = GGMLQuantizationType
_SMALLER_BLOCKS = {_T.Q4_K: _T.Q5_0, _T.Q5_K: _T.Q5_1, _T.Q6_K: _T.Q8_0}
"""Types with blocks of 32 weights that llama.cpp takes for rows which blocks of 256 weights do not fill."""


def input_file(folder: Path) -> GGUFReader:
    """Open the GGUF file from which a folder was pruned.

    Raises:
        SecateurError: The folder was pruned from another model, or the file is not there or broken.
    """
    source = original_model(folder)
    if source is None or not source.endswith(".gguf"):
        raise SecateurError(
            f"{folder}: --type {AS_INPUT} is for models that were pruned from a .gguf file, and this one was pruned "
            f"from {source or 'an unknown model'}; choose another type"
        )
    if not (file := local_path(source)).is_file():
        raise SecateurError(
            f"{folder}: --type {AS_INPUT} reads the types from the file that was pruned, but {source} is not there; "
            "put it back, or choose another type"
        )
    try:
        return GGUFReader(file)
    except Exception as error:
        # The reader maps the file into memory, and fails in many ways when something is missing.
        raise SecateurError(f"{file}: truncated or broken GGUF; restore it, or choose another type") from error


@dataclass(frozen=True)
class OutputTensor:
    """Tensor of the output."""

    exact: ReaderTensor
    """Tensor with the exact weights."""
    before: ReaderTensor | None
    """Tensor of the input that has the same weights; None if there is none."""
    type: GGMLQuantizationType

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape, with the slowest axis first."""
        return tuple(int(size) for size in reversed(self.exact.shape))

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape)) // block * size

    def data(self) -> np.ndarray[Any, Any]:
        """Return the bytes to write."""
        if self.before is not None:
            return np.asarray(self.before.data)
        return quantised_rows(_values(self.exact), self.type)


def convert_as_input(exact: Path, before: GGUFReader, out: Path, dtype: torch.dtype, watcher: Watcher) -> None:
    """Write a file again with the types of another file.

    Args:
        exact: File with the weights of the folder, unrounded.
        before: The file that was pruned.
        out: The new file.
        dtype: Dtype to which the weights of `before` were dequantised.
        watcher: Shows the progress.

    Raises:
        SecateurError: A tensor had a type that cannot be made here.
    """
    reader = GGUFReader(exact)
    found = {tensor.name: tensor for tensor in before.tensors}
    tensors = [
        _output_tensor(tensor, found.get(tensor.name), dtype) for tensor in watcher.track(reader.tensors, "Compare")
    ]
    writer = GGUFWriter(None, str(reader.fields["general.architecture"].contents()))
    for key, value, kind, part in _metadata(reader, before):
        writer.add_key_value(key, value, kind, part)
    for tensor in tensors:
        writer.add_tensor_info(tensor.exact.name, tensor.shape, np.dtype(np.float32), tensor.bytes, tensor.type)
    try:
        writer.write_header_to_file(out)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in watcher.track(tensors, "Writing"):
            writer.write_tensor_data(tensor.data())
    finally:
        writer.close()


def _output_tensor(tensor: ReaderTensor, before: ReaderTensor | None, dtype: torch.dtype) -> OutputTensor:
    """Return a tensor of the output.

    Raises:
        SecateurError: Its type cannot be made.
    """
    if before is None:
        return OutputTensor(tensor, None, tensor.tensor_type)
    if _is_same(tensor, before, dtype):
        return OutputTensor(tensor, before, before.tensor_type)
    type = _possible_type(before.tensor_type, int(tensor.shape[0]))
    try:
        quantised_rows(np.zeros((1, gguf.GGML_QUANT_SIZES[type][0]), np.float32), type)
    except SecateurError as error:
        raise SecateurError(f"tensor {tensor.name} cannot become {type.name.lower()} again: {error}") from error
    return OutputTensor(tensor, None, type)


def _is_same(tensor: ReaderTensor, before: ReaderTensor, dtype: torch.dtype) -> bool:
    """Return whether a tensor of the input has these weights, up to the rounding of the folder."""
    if list(tensor.shape) != list(before.shape):
        return False
    now, then = (torch.from_numpy(_values(one)).to(dtype) for one in (tensor, before))
    return torch.equal(now, then)


def _possible_type(type: GGMLQuantizationType, row: int) -> GGMLQuantizationType:
    """Return a type, or a similar one whose blocks fill rows of some length."""
    while row % gguf.GGML_QUANT_SIZES[type][0]:
        type = _SMALLER_BLOCKS.get(type, _T.IQ4_NL if gguf.GGML_QUANT_SIZES[type][0] > 32 else _T.F16)
    return type


def _values(tensor: ReaderTensor) -> np.ndarray[Any, Any]:
    """Return the weights of a tensor as float32, with the slowest axis first."""
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return np.array(values, np.float32).reshape([int(size) for size in reversed(tensor.shape)])


def _metadata(reader: GGUFReader, before: GGUFReader) -> Iterator[tuple[str, Any, gguf.GGUFValueType, Any]]:
    """Yield the metadata of the output: key, value, type, and type of the items of a list."""
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            named = before.fields.get(key, field) if key == "general.file_type" else field
            kind, *parts = named.types
            yield key, named.contents(), kind, parts[-1] if parts else None
