"""Safetensors files, written tensor by tensor."""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from secateur.base.json_files import damaged_state
from secateur.checkpoints.expert_matrices import BlockTensor
from secateur.checkpoints.weights import DTYPES, INDEX, SINGLE

SHARD_BYTES = 5 * 10**9
"""Default limit on the bytes of a shard."""

HEADER_BYTES = 2**20
"""Default number of bytes reserved for the header of a shard: enough for some thousand tensors."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ShardWriter:
    """Writer of safetensors shards: each tensor goes to disk when it is added, and an index names the shards.

    In this format, a header comes before the data. Space for the header is reserved at the start of each file. The
    header is written when the shard is finished, and padded with spaces, which the format allows.
    """

    def __init__(self, folder: Path, *, header_bytes: int = HEADER_BYTES, limit_bytes: int = SHARD_BYTES):
        """Start without any shard.

        Args:
            folder: An existing folder.
            header_bytes: Bytes to reserve for the header of each shard; see `header_bytes_for`.
            limit_bytes: Limit on the data bytes of a shard; a larger tensor gets a shard of its own.
        """
        self.folder = folder
        self.header_bytes = header_bytes
        self.limit_bytes = limit_bytes
        self.total_bytes = 0
        self._shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._size = 0
        self._hashes: list[str] = []
        """Hash of the data of each shard, up to the last saved state."""
        self._hashers: dict[int, tuple[int, Any]] = {}
        """Data bytes that the hash of each shard covers so far, and the hash object."""

    def __contains__(self, name: object) -> bool:
        return any(name in shard for shard in self._shards)

    def save_state(self) -> dict[str, Any]:
        """Flush everything that was added to disk, and return the state from which `resume` continues, for JSON."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        # The last shard of the saved state has grown since, and others may follow it.
        for number in range(max(1, len(self._hashes)), len(self._shards) + 1):
            self._hashes[number - 1 :] = [self._hash(number)]
        return {"shards": self._shards, "hashes": self._hashes, "header": self.header_bytes}

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from a saved state of another writer of this folder; tensors that it added later are dropped.

        Args:
            state: The result of `save_state`.

        Raises:
            SecateurError: The data in the files have changed since the state was saved.
        """
        self._shards, self._hashes, self.header_bytes = state["shards"], state["hashes"], state["header"]
        ends = [max(entry["data_offsets"][1] for entry in shard.values()) for shard in self._shards]
        self.total_bytes = sum(ends)
        for number, wanted in enumerate(self._hashes, 1):
            # `close` may have renamed this shard already.
            for named in (*self.folder.glob(f"model-{number:05d}-of-*"), self.folder / SINGLE):
                if named.exists() and not self._path(number).exists():
                    named.rename(self._path(number))
            if self._hash(number) != wanted:
                raise damaged_state(self._path(number))
        if self._shards:
            last = self._path(len(self._shards))
            self._size = ends[-1]
            os.truncate(last, 8 + self.header_bytes + self._size)
            self._file = last.open("r+b")
            self._file.seek(0, os.SEEK_END)

    def _hash(self, number: int) -> str:
        """Return the hash of a shard's data. Bytes that were hashed before are not read again."""
        end = max(entry["data_offsets"][1] for entry in self._shards[number - 1].values())
        place, hasher = self._hashers.pop(number, (0, hashlib.sha256()))
        with suppress(FileNotFoundError), self._path(number).open("rb", buffering=0) as file:
            file.seek(8 + self.header_bytes + place)
            while place < end and (piece := file.read(min(end - place, 2**24))):
                hasher.update(piece)
                place += len(piece)
        self._hashers[number] = place, hasher
        return hasher.hexdigest()

    def add(self, name: str, tensor: BlockTensor) -> None:
        """Write a tensor, to a new shard if it does not fit into the last one.

        Raises:
            ValueError: A tensor of this name was added before.
        """
        if name in self:
            raise ValueError(f"{name} was added twice")
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        if self._file is None or (self._size and self._size + size > self.limit_bytes):
            self._finish_shard()
            self._shards.append({})
            self._file = self._path(len(self._shards)).open("wb")
            self._file.write(b" " * (8 + self.header_bytes))
        # Matrices of experts are in memory one at a time.
        for part in (tensor,) if isinstance(tensor, Tensor) else tensor:
            self._file.write(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._shards[-1][name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._size, self._size + size],
        }
        self._size += size
        self.total_bytes += size

    def close(self) -> None:
        """Finish the last shard, give all shards their final names, and write the index if there are several.

        Raises:
            ValueError: No tensor was added.
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
        """Write the header of the last shard into the reserved space, and close the file."""
        if self._file is None:
            return
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._shards[-1]}, separators=(",", ":")).encode()
        if len(header) > self.header_bytes:
            raise ValueError(f"the header takes {len(header)} bytes, but {self.header_bytes} bytes were reserved")
        with self._file as file:
            file.seek(0)
            # The whole space is overwritten, whatever a stopped run left in it.
            file.write(self.header_bytes.to_bytes(8, "little") + header.ljust(self.header_bytes))
        self._file, self._size = None, 0


def header_bytes_for(names: Iterable[str]) -> int:
    """Return an upper bound on the bytes of a safetensors header with these tensors, a multiple of 8."""
    return 64 + sum(len(json.dumps(name)) + 128 for name in names) // 8 * 8
