"""An output folder that appears whole or not at all, and safetensors shards written as tensors come.

Everything is written into a hidden folder beside the target, which takes the target's name at the very end.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import secrets
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.json_text import parse_json
from secateur.model.weights import INDEX, SINGLE, some

SHARD_BYTES = 5 * 10**9
"""Default limit of a shard."""

HEADER_BYTES = 2**20
"""Default room for a shard's header: some thousand tensors."""

_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

_SPARE = 16 * 2**20
"""Room kept beside the expected bytes, for configs and the tokenizer."""


class OutputFolder:
    """A folder under construction; as a context manager it gives the hidden folder to write into.

    On a clean exit the hidden folder takes the target's name. On any exception it is removed, and what was at
    the target stays as it was.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        source: Path | None = None,
        expected_bytes: int = 0,
        files: Collection[str] | None = None,
    ):
        """Describe the output; nothing is touched before `check` or entering.

        Args:
            path: the target.
            overwrite: replace a model folder that is already there.
            source: the folder of the model being read, which the output must leave alone.
            expected_bytes: what will be written, in bytes, to be compared with the free space.
            files: the names of all that will be written, where that is no model: a folder that holds nothing else
                may be replaced, in place of a model folder.
        """
        # Through symbolic links, so that the folder itself is replaced and not a link to it.
        self.path = Path(path).expanduser().resolve()
        self.overwrite = overwrite
        self.source = None if source is None else source.resolve()
        self.expected_bytes = expected_bytes
        self.files = files
        self._partial: Path | None = None

    def check(self) -> None:
        """See that the folder can be written, without leaving a trace.

        Raises:
            SecateurError: it would touch the source or other files, its parent is missing or not writable, or
                the disk is too small.
        """
        self._check_target()
        self._check_room()
        self._make_partial().rmdir()

    def __enter__(self) -> Path:
        self._check_target()
        self._check_room()
        self._partial = self._make_partial()
        return self._partial

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._partial is not None
        try:
            if error is None:
                self._replace(self._partial)
            elif is_disk_full(error):
                raise SecateurError(
                    f"{self.path}: the disk is full; make room and run again (nothing was left there)"
                ) from error
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial = None

    def _check_target(self) -> None:
        """Everything that can be said of the target without writing."""
        path, source = self.path, self.source
        if source is not None and (path == source or path in source.parents or source in path.parents):
            place = "the model's own folder" if path == source else "inside or around the model's own folder"
            raise SecateurError(f"{path}: this is {place}, which would be lost or mixed up; choose another")
        if path.exists() and not path.is_dir():
            raise SecateurError(f"{path}: a file is there; choose another name")
        if path.is_mount() or path == Path.cwd():
            what = "the folder you are in" if path == Path.cwd() else "where a file system is mounted"
            raise SecateurError(f"{path}: this is {what}, which cannot be replaced; name a folder in it, not this one")
        if path.is_dir() and any(path.iterdir()):
            if not self.overwrite:
                raise SecateurError(f"{path}: exists and is not empty; choose another name, or overwrite it")
            if self.files is not None:
                others = sorted(file.name for file in path.iterdir() if file.name not in self.files)
                if others:
                    raise SecateurError(
                        f"{path}: not overwritten, as it holds other files ({some(others)}); choose another name"
                    )
            elif not _is_model(path):
                raise SecateurError(
                    f"{path}: not overwritten, as it does not look like a model folder "
                    "(no config.json with a model_type); choose another name"
                )
        if not path.parent.is_dir():
            raise SecateurError(f"{path}: the folder {path.parent} does not exist; create it first")

    def _check_room(self) -> None:
        """Compare the free space with what will be written."""
        if self.expected_bytes:
            check_room(self.path, self.expected_bytes + _SPARE)

    def _make_partial(self) -> Path:
        """The hidden folder. Not mkdtemp, whose folders nobody else may read."""
        partial = self._sibling("partial")
        try:
            partial.mkdir()
        except OSError as error:
            raise SecateurError(
                f"{self.path}: cannot write into {self.path.parent} ({error.strerror}); choose another place"
            ) from error
        return partial

    def _sibling(self, purpose: str) -> Path:
        """A new hidden name beside the target, on the same file system."""
        return self.path.parent / f".{self.path.name}.{purpose}-{secrets.token_hex(4)}"

    def _replace(self, partial: Path) -> None:
        """Give the hidden folder the target's name; an old folder is removed only after that."""
        # What has come to be there since the start is no more ours to remove than before.
        self._check_target()
        old = self._sibling("old") if self.path.exists() else None
        try:
            if old is not None:
                self.path.rename(old)
            partial.rename(self.path)
        except BaseException as error:
            if old is not None and old.exists() and not self.path.exists():
                old.rename(self.path)
            if isinstance(error, OSError):
                raise SecateurError(f"{self.path}: cannot be put in place ({error.strerror})") from error
            raise
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


def leftovers(path: Path) -> list[Path]:
    """What runs that were killed have left beside a target, or others are still writing."""
    name = glob.escape(path.name)
    # A GGUF file is made from a folder with a hidden name of its own.
    patterns = (f".{name}.partial-*", f".{name}.folder-*", f"..{name}.folder-*.partial-*")
    return [left for pattern in patterns for left in path.parent.glob(pattern)]


class ShardWriter:
    """Tensors into safetensors shards, each written to disk as it comes; an index where there is more than one shard.

    The format puts a header before the data. Room for it is reserved at the start of a file and padded with spaces,
    as the format allows, once all that it must say is known.
    """

    def __init__(self, folder: Path, *, header_bytes: int = HEADER_BYTES, limit_bytes: int = SHARD_BYTES):
        """Start without files.

        Args:
            folder: an existing folder.
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
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._append(data)
        self._shards[-1][name] = {
            "dtype": _DTYPES[tensor.dtype],
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

    def _append(self, data: Tensor) -> None:
        assert self._file is not None
        self._file.write(data.numpy().data)

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


def check_room(path: Path, needed: int) -> None:
    """See that so many bytes fit beside a path.

    Raises:
        SecateurError: they do not.
    """
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise SecateurError(f"{path}: {needed / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free; make room")


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception says that there is no room; the safetensors library wraps the system's error."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, SafetensorError) and any(
        f"os error {code})" in str(error) for code in (errno.ENOSPC, errno.EDQUOT)
    )


def _is_model(folder: Path) -> bool:
    """Whether a folder looks like a model, which overwriting may remove."""
    with contextlib.suppress(OSError, ValueError):
        config = parse_json((folder / "config.json").read_text(encoding="utf-8"))
        return isinstance(config, dict) and "model_type" in config
    return False
