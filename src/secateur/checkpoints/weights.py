"""Tensors of a safetensors folder: listed from the headers, read one at a time.

A tensor is read into memory and not memory-mapped, so that resident memory is the tensors that the caller keeps.
Nothing is unpickled: a folder with only pytorch_model.bin is refused.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.json_files import parse_json
from secateur.base.words import first_few
from secateur.checkpoints.expert_matrices import BlockTensor, ExpertMatrices, whole

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
    """Shape and dtype of a tensor, and its place in a file; subclasses are tensors that are stored in other ways."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path = Path()
    offset: int = 0
    """Offset in the file, in bytes."""

    @property
    def entries(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Number of bytes of the values."""
        return self.entries * self.dtype.itemsize

    @property
    def parts(self) -> "tuple[TensorInfo, ...]":
        """Tensors in files that must be read for this tensor: itself."""
        return (self,)

    def rows(self, first: int, stop: int) -> "TensorInfo":
        """Return the part of a tensor in a file from one index of the first axis to another."""
        size = self.bytes // max(1, self.shape[0])
        return TensorInfo((stop - first, *self.shape[1:]), self.dtype, self.file, self.offset + first * size)

    def read(self) -> Tensor:
        """Return the values in CPU memory.

        Raises:
            SecateurError: The file has become shorter since it was opened.
        """
        data = torch.empty(self.bytes, dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.offset)
            if not read_into(stream, data.numpy().data):
                raise SecateurError(f"{self.file}: ended early; it has changed since it was opened")
        return data.view(self.dtype).view(self.shape)

    def read_entry(self, index: int) -> Tensor:
        """Return the values at one index of the first axis: the matrix of one expert."""
        return self.rows(index, index + 1).read()[0]

    def as_stored(self, tensor: BlockTensor) -> BlockTensor:
        """Return new values for the tensor in its stored form."""
        return tensor

    def samples(self, size: int) -> Iterator[Sample]:
        """Yield up to `size` bytes at the start, middle and end of each tensor that must be read."""
        for part in self.parts:
            with part.file.open("rb") as file:
                for place in range(3):
                    file.seek(part.offset + max(0, part.bytes - size) * place // 2)
                    yield file.read(min(size, part.bytes))


@dataclass(frozen=True, kw_only=True)
class InMemory(TensorInfo):
    """Tensor of a model in memory, on any device."""

    values: Tensor

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """Tensors in files that must be read: none."""
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


@dataclass(frozen=True, kw_only=True)
class Computed(TensorInfo):
    """Tensor that is computed from stored tensors when it is read, such as a dequantised weight."""

    sources: tuple[TensorInfo, ...]
    compute: Callable[..., Tensor]
    """Function of the values of `sources`. It also takes some of the experts, with a source that is the same for all
    experts unchanged."""

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """Tensors in files that must be read."""
        return tuple(part for source in self.sources for part in source.parts)

    def read(self) -> Tensor:
        """Return the values in CPU memory."""
        return self.compute(*(source.read() for source in self.sources))

    def read_entry(self, index: int) -> Tensor:
        """Return the values at one index of the first axis: the matrix of one expert."""
        values = (
            source.read_entry(index)[None] if source.shape[:1] == self.shape[:1] else source.read()
            for source in self.sources
        )
        return self.compute(*values)[0]


class OneByOne(Computed):
    """Matrices of all experts (expert x outputs x inputs), each of which has stored tensors of its own.

    The tensors of the first expert come first. The outputs of several tensors of an expert are joined.
    """

    @classmethod
    def of(cls, sources: Sequence[TensorInfo], each: int) -> "OneByOne":
        """Return the matrices of all experts, each of which has `each` of the stored matrices."""
        shape = (len(sources) // each, sum(source.shape[0] for source in sources[:each]), sources[0].shape[1])

        def joined(*matrices: Tensor) -> Tensor:
            return matrices[0] if each == 1 else torch.cat(matrices)

        return cls(shape, sources[0].dtype, sources=tuple(sources), compute=joined)

    def read(self) -> Tensor:
        """Return the values in CPU memory."""
        return whole(ExpertMatrices(self.shape, self.dtype, self.read_entry))

    def read_entry(self, index: int) -> Tensor:
        """Return the matrix of one expert; the system reads the next expert from disk meanwhile."""
        read_ahead(self._matrices((index + 1) % self.shape[0]))
        return self.compute(*(source.read() for source in self._matrices(index)))

    def _matrices(self, expert: int) -> tuple[TensorInfo, ...]:
        each = len(self.sources) // self.shape[0]
        return self.sources[expert * each : (expert + 1) * each]


class Transposed(Computed):
    """Matrices (expert x outputs x inputs) that are stored transposed."""

    @classmethod
    def of(cls, stored: TensorInfo) -> "Transposed":
        """Return the matrices of a tensor in which inputs come first."""
        experts, inputs, outputs = stored.shape
        shape = (experts, outputs, inputs)
        return cls(shape, stored.dtype, sources=(stored,), compute=lambda values: values.mT.contiguous())

    def as_stored(self, tensor: BlockTensor) -> BlockTensor:
        """Return the transposed matrices."""
        return tensor.mT.contiguous() if isinstance(tensor, Tensor) else tensor.transposed()


def selected_rows(stored: TensorInfo, runs: Sequence[tuple[int, int]]) -> TensorInfo:
    """Return some rows of a stored tensor: of an embedding, the tokens of a smaller vocabulary.

    Args:
        stored: The tensor (rows x ...). If it is in a file, no other rows are read.
        runs: First row of each run of consecutive rows, and the row after its last, in order.
    """
    shape = (sum(stop - first for first, stop in runs), *stored.shape[1:])
    if stored.parts == (stored,):
        parts = tuple(stored.rows(first, stop) for first, stop in runs)
        return Computed(shape, stored.dtype, sources=parts, compute=lambda *values: torch.cat(values))

    def compute(whole: Tensor) -> Tensor:
        return torch.cat([whole[first:stop] for first, stop in runs])

    return Computed(shape, stored.dtype, sources=(stored,), compute=compute)


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
            info = TensorInfo(shape, DTYPES[entry["dtype"]], file, 8 + length + begin)
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
    for part in chain.from_iterable(info.parts for info in infos):
        with suppress(OSError), part.file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), part.offset, part.bytes, os.POSIX_FADV_WILLNEED)


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
