"""Safetensors shards, written as tensors come."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from secateur.model.weights import DTYPES, INDEX, SINGLE

SHARD_BYTES = 5 * 10**9
"""Default limit of a shard."""

HEADER_BYTES = 2**20
"""Default room for a shard's header: some thousand tensors."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ShardWriter:
    """Tensors into safetensors shards, each written to disk as it comes; an index where there is more than one shard.

    The format puts a header before the data. Room for it is reserved at the start of a file and padded with spaces,
    as the format allows, once all that it must say is known.
    """

    def __init__(self, folder: Path, *, header_bytes: int = HEADER_BYTES, limit_bytes: int = SHARD_BYTES):
        """Start without files in an existing folder.

        Args:
            header_bytes: room to reserve in each shard, see `header_room`.
            limit_bytes: the most that a shard holds; a larger tensor gets a shard of its own.
        """
        self.folder = folder
        self.header_bytes = header_bytes
        self.limit_bytes = limit_bytes
        self.total_bytes = 0
        self._shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._size = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, into a new shard if it does not fit into this one.

        Raises:
            ValueError: the name was there already.
        """
        if any(name in shard for shard in self._shards):
            raise ValueError(f"{name} was added twice")
        size = tensor.numel() * tensor.element_size()
        if self._file is None or (self._size and self._size + size > self.limit_bytes):
            self._finish_shard()
            self._shards.append({})
            self._file = self._path(len(self._shards)).open("wb")
            self._file.write(b" " * (8 + self.header_bytes))
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._shards[-1][name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._size, self._size + size],
        }
        self._size += size
        self.total_bytes += size

    def close(self) -> None:
        """Finish the last shard and give all their final names.

        Raises:
            ValueError: nothing was added.
        """
        if not self._shards:
            raise ValueError("no tensor was added")
        self._finish_shard()
        count = len(self._shards)
        if count == 1:
            self._path(1).rename(self.folder / SINGLE)
            return
        weight_map = {}
        for number, names in enumerate(self._shards, start=1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._path(number).rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _path(self, number: int) -> Path:
        return self.folder / f".shard-{number:05d}.partial"

    def _finish_shard(self) -> None:
        """Fill in the reserved header and close the file."""
        if self._file is None:
            return
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._shards[-1]}, separators=(",", ":")).encode()
        if len(header) > self.header_bytes:
            raise ValueError(f"the header takes {len(header)} bytes, and {self.header_bytes} were reserved")
        with self._file as file:
            file.seek(0)
            file.write(self.header_bytes.to_bytes(8, "little") + header)
        self._file, self._size = None, 0


def header_room(names: Iterable[str]) -> int:
    """Bytes that a safetensors header of these tensors takes at the most, a multiple of 8."""
    return 64 + sum(len(json.dumps(name)) + 128 for name in names) // 8 * 8
