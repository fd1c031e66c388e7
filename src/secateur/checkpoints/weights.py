"""Tensors of a safetensors folder: listed from the headers, read one at a time.

A tensor is read into memory and not memory-mapped, so that resident memory is the tensors that the caller keeps.
Nothing is unpickled: a folder with only pytorch_model.bin is refused.
"""

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.json_files import parse_json
from secateur.base.words import first_few
from secateur.checkpoints.expert_matrices import BlockTensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by their names in safetensors headers."""

Sample = bytes
"""Some bytes of a tensor; inside the classes, `bytes` is the size of a tensor."""
_LONGEST_NAME = 255
"""Largest number of bytes of a file's name; longer names are an error of the operating system."""
_HEADER_LIMIT = 100_000_000
"""Largest size of a header in bytes, by the format's specification; a longer header is a broken file."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape, dtype and file position of a stored tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    """Offset in the file, in bytes."""

    @property
    def entries(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Number of bytes in the file."""
        return self.entries * self.dtype.itemsize

    @property
    def parts(self) -> "tuple[TensorInfo, ...]":
        """Stored tensors that make up the tensor: itself."""
        return (self,)

    def read(self) -> Tensor:
        """Return the values; see `read_tensor`."""
        return read_tensor(self)

    def read_entry(self, index: int) -> Tensor:
        """Return the values at one index of the first axis."""
        shape, size = self.shape[1:], self.bytes // max(1, self.shape[0])
        return read_tensor(TensorInfo(self.file, shape, self.dtype, self.offset + index * size))

    def as_stored(self, tensor: BlockTensor) -> BlockTensor:
        """Return new values for the tensor in its stored form."""
        return tensor

    def samples(self, size: int) -> Iterator[Sample]:
        """Yield up to `size` bytes at the start, middle and end of each stored tensor that must be read."""
        for part in self.parts:
            with part.file.open("rb") as file:
                for place in range(3):
                    file.seek(part.offset + max(0, part.bytes - size) * place // 2)
                    yield file.read(min(size, part.bytes))


@dataclass(frozen=True)
class InMemory(TensorInfo):
    """Tensor of a model in memory, on any device."""

    values: Tensor

    @classmethod
    def of(cls, values: Tensor) -> "InMemory":
        """Return a tensor of a model."""
        return cls(Path(), tuple(values.shape), values.dtype, 0, values)

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """Stored tensors that must be read: none."""
        return ()

    def read(self) -> Tensor:
        """Return a copy of the values in CPU memory."""
        return self.values.detach().to("cpu", copy=True).contiguous()

    def read_entry(self, index: int) -> Tensor:
        """Return a copy of the values at one index of the first axis, in CPU memory."""
        return self.values.detach()[index].to("cpu", copy=True).contiguous()

    def samples(self, size: int) -> Iterator[Sample]:
        """Yield up to `size` bytes at the start, middle and end of the tensor."""
        flat = self.values.detach().reshape(-1)
        count = min(len(flat), max(1, size // self.dtype.itemsize))
        for place in range(3):
            start = (len(flat) - count) * place // 2
            yield flat[start : start + count].cpu().contiguous().view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class Transposed(TensorInfo):
    """Matrices (expert x outputs x inputs) that are stored transposed."""

    stored: TensorInfo
    """Tensor as it is stored."""

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """Stored tensors that must be read."""
        return self.stored.parts

    def read(self) -> Tensor:
        """Return the values."""
        return self.stored.read().transpose(1, 2).contiguous()

    def read_entry(self, index: int) -> Tensor:
        """Return the matrix of one expert."""
        return self.stored.read_entry(index).T.contiguous()

    def as_stored(self, tensor: BlockTensor) -> BlockTensor:
        """Return the transposed matrices."""
        return tensor.transpose(1, 2).contiguous() if isinstance(tensor, Tensor) else tensor.transposed()


@dataclass(frozen=True)
class SelectedRows(TensorInfo):
    """Some rows of a stored tensor: of an embedding, the tokens of a smaller vocabulary."""

    stored: TensorInfo
    """Tensor as it is stored."""
    runs: tuple[tuple[int, int], ...]
    """First row of each run of consecutive rows, and the row after its last, in order."""

    @classmethod
    def of(cls, stored: TensorInfo, runs: tuple[tuple[int, int], ...]) -> "SelectedRows":
        """Return some rows of a stored tensor.

        Args:
            stored: The tensor (rows x ...).
            runs: First row of each run of consecutive rows, and the row after its last, in order.
        """
        rows = sum(stop - first for first, stop in runs)
        return cls(stored.file, (rows, *stored.shape[1:]), stored.dtype, stored.offset, stored, runs)

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """Stored tensors that must be read."""
        return self.stored.parts

    def read(self) -> Tensor:
        """Return the values of the rows; of a tensor that is stored as it is, only these rows are read from the file.

        Raises:
            SecateurError: The file has become shorter since it was opened.
        """
        if self.stored.parts != (self.stored,):
            whole = self.stored.read()
            return torch.cat([whole[first:stop] for first, stop in self.runs])
        row_bytes = self.bytes // max(1, self.shape[0])
        data = torch.empty(self.bytes, dtype=torch.uint8)
        view = data.numpy().data
        with self.file.open("rb", buffering=0) as stream:
            for first, stop in self.runs:
                stream.seek(self.offset + first * row_bytes)
                if not read_into(stream, view[: (stop - first) * row_bytes]):
                    raise ended_early(self.file)
                view = view[(stop - first) * row_bytes :]
        return data.view(self.dtype).view(self.shape)

    def read_entry(self, index: int) -> Tensor:
        """Return the values of one row."""
        rows = chain.from_iterable(range(first, stop) for first, stop in self.runs)
        return self.stored.read_entry(next(islice(rows, index, None)))


def list_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Return all tensors of a folder, from the headers of its safetensors files.

    Raises:
        SecateurError: There are no weights, none that can be read without unpickling, or they are incomplete.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        raise SecateurError(_no_weights(folder))
    shards = index_shards(index)
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise SecateurError(f"{index}: shards missing: {first_few(missing)}; download them")
    tensors: dict[str, TensorInfo] = {}
    for shard, names in shards.items():
        header = read_header(folder / shard)
        lacking = [name for name in names if name not in header]
        if lacking:
            raise SecateurError(
                f"{folder / shard}: tensors missing that {INDEX} names: {first_few(lacking)}; download it again"
            )
        tensors.update({name: header[name] for name in names})
    return tensors


def index_shards(index: Path) -> dict[str, list[str]]:
    """Return the names of the tensors of each shard file, from an index file."""
    try:
        weight_map = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, list[str]] = {}
        for name, shard in weight_map.items():
            if Path(str(shard)).name != shard or len(os.fsencode(shard)) > _LONGEST_NAME:
                raise SecateurError(f"{index}: {shard!r} is missing from the folder; download the model again")
            shards.setdefault(str(shard), []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SecateurError(f"{index}: not a safetensors index; download it again") from error
    return shards


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one safetensors file.

    Raises:
        SecateurError: The header is broken, or the file is shorter or longer than it says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise SecateurError(f"{file}: a Git LFS pointer, not the weights; run `git lfs pull`")
        if size < 8 or length > _HEADER_LIMIT or 8 + length > size:
            raise SecateurError(f"{file}: truncated, or not a safetensors file (header broken); download it again")
        text = stream.read(length)
    try:
        entries: dict[str, dict[str, Any]] = parse_json(text)
        said = entries.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in said.values()):
            raise ValueError("its metadata are not text")
        tensors, last = {}, 0
        for name, entry in sorted(entries.items(), key=lambda one: tuple(one[1]["data_offsets"])):
            (begin, end), shape = entry["data_offsets"], tuple(entry["shape"])
            if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
                raise ValueError(f"{name}: a size is not a whole number")
            info = TensorInfo(file, shape, DTYPES[entry["dtype"]], 8 + length + begin)
            if end - begin != info.bytes or begin != last:
                raise ValueError(name)
            tensors[name], last = info, end
        tensors = {name: tensors[name] for name in entries}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SecateurError(f"{file}: header broken ({error}); download it again") from error
    if 8 + length + last != size:
        raise SecateurError(
            f"{file}: truncated or damaged: it has {size:,} bytes, but its header says {8 + length + last:,}; "
            "download it again"
        )
    return tensors


def read_tensor(info: TensorInfo) -> Tensor:
    """Return one tensor in CPU memory.

    Raises:
        SecateurError: The file has become shorter since it was opened.
    """
    data = torch.empty(info.bytes, dtype=torch.uint8)
    with info.file.open("rb", buffering=0) as stream:
        stream.seek(info.offset)
        if not read_into(stream, data.numpy().data):
            raise ended_early(info.file)
    return data.view(info.dtype).view(info.shape)


def ended_early(file: Path) -> SecateurError:
    """Return the error for a file that has become shorter since it was opened."""
    return SecateurError(f"{file}: ended early; it has changed since it was opened")


def read_into(stream: FileIO, view: memoryview) -> bool:
    """Fill memory from a file, and return whether the file had enough bytes."""
    # One read returns at most 2 GiB on Linux.
    while view and (count := stream.readinto(view)):
        view = view[count:]
    return not view


def read_ahead(infos: Iterable[TensorInfo]) -> None:
    """Ask the operating system to read tensors from disk in the background, if it supports this."""
    if not hasattr(os, "posix_fadvise"):
        return
    for info in infos:
        with suppress(OSError), info.file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), info.offset, info.bytes, os.POSIX_FADV_WILLNEED)


def has_weights(folder: Path) -> bool:
    """Return whether a folder has safetensors weights, with every shard of its index."""
    if (folder / SINGLE).is_file():
        return True
    index = folder / INDEX
    return index.is_file() and all((folder / shard).is_file() for shard in index_shards(index))


def _no_weights(folder: Path) -> str:
    """Return the error for a folder without safetensors weights."""
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")) or list(folder.glob("*.pth")):
        return (
            f"{folder}: only pickled weights (.bin), which are not opened because they can run code; "
            "use a revision with safetensors, or convert them with save_pretrained"
        )
    if list(folder.glob("*.safetensors")):
        return f"{folder}: neither {SINGLE} nor {INDEX}, only other safetensors files; restore the index"
    return f"{folder}: no weights; {SINGLE} or {INDEX} and its shards are needed"
