"""An output folder that appears whole or not at all, and safetensors shards written as tensors come.

Everything is written into a hidden folder beside the target, which takes the target's name at the very end.
"""

from __future__ import annotations

import contextlib
import errno
import json
import secrets
import shutil
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from secateur.errors import SecateurError
from secateur.weights import INDEX, SINGLE

SHARD_BYTES = 2 * 10**9
"""Default limit of a shard, and so of the memory that pending tensors take."""

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
    ):
        """Describe the output; nothing is touched before `check` or entering.

        Args:
            path: the target.
            overwrite: replace a model folder that is already there.
            source: the folder of the model being read, which the output must leave alone.
            expected_bytes: what will be written, in bytes, to be compared with the free space.
        """
        # Through symbolic links, so that the folder itself is replaced and not a link to it.
        self.path = Path(path).expanduser().resolve()
        self.overwrite = overwrite
        self.source = None if source is None else source.resolve()
        self.expected_bytes = expected_bytes
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
        if path.is_dir() and any(path.iterdir()):
            if not self.overwrite:
                raise SecateurError(f"{path}: exists and is not empty; choose another name, or overwrite it")
            if not _is_model(path):
                raise SecateurError(
                    f"{path}: not overwritten, as it does not look like a model folder "
                    "(no config.json with a model_type); choose another name"
                )
        if not path.parent.is_dir():
            raise SecateurError(f"{path}: the folder {path.parent} does not exist; create it first")

    def _check_room(self) -> None:
        """Compare the free space with what will be written."""
        free = shutil.disk_usage(self.path.parent).free
        if self.expected_bytes and free < self.expected_bytes + _SPARE:
            need, have = self.expected_bytes / 1e9, free / 1e9
            raise SecateurError(f"{self.path}: {need:.2f} GB are needed and {have:.2f} GB are free; make room")

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


class ShardWriter:
    """Tensors into safetensors shards of a limited size, with an index where there is more than one.

    A tensor must not change between `add` and the writing of its shard.
    """

    def __init__(self, folder: Path, *, limit_bytes: int = SHARD_BYTES):
        """Start without files.

        Args:
            folder: an existing folder.
            limit_bytes: the most that a shard holds; a larger tensor gets a shard of its own.
        """
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.total_bytes = 0
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self._names: set[str] = set()

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; writes a shard when the pending ones and this one exceed the limit.

        Raises:
            ValueError: the name was there already.
        """
        if name in self._names:
            raise ValueError(f"{name} was added twice")
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.limit_bytes:
            self._flush()
        tensor = tensor.detach().cpu().contiguous()
        # A slice would keep the whole storage alive, and a shared one is refused by the format.
        if tensor.untyped_storage().nbytes() != size or any(
            tensor.data_ptr() == other.data_ptr() for other in self._pending.values() if size
        ):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        self._names.add(name)
        self._pending[name] = tensor
        self._pending_bytes += size
        self.total_bytes += size

    def close(self) -> None:
        """Write what is pending and give the shards their final names.

        Raises:
            ValueError: nothing was added.
        """
        if not self._names:
            raise ValueError("no tensor was added")
        if self._pending:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._shards[0][0].rename(self.folder / SINGLE)
            return
        weight_map = {}
        for number, (file, names) in enumerate(self._shards, start=1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            file.rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        """Write the pending tensors as one shard."""
        file = self.folder / f".shard-{len(self._shards) + 1:05d}.partial"
        save_file(self._pending, file, metadata={"format": "pt"})
        self._shards.append((file, list(self._pending)))
        self._pending, self._pending_bytes = {}, 0


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
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return isinstance(config, dict) and "model_type" in config
    return False
