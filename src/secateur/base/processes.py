"""Processes that prune one model together.

Each process has a share of the calibration rows with all their activations. Sums over rows are reduced across
processes. A linear system is solved by its owner rank alone, which broadcasts the solution. All processes run the same
program and make the same calls in the same order. They exchange plain tensors only, and JSON as bytes. A single
process exchanges nothing.

Sums do not depend on the number of processes. Rows are shared in whole batches, and every sum has one part for each
batch. Large sums have float32 parts, are added up in float64 and then rounded to float32 (`total_tensors`). Float64
holds such sums exactly, unless a part is 2^29 times smaller than the sum; the order then changes the last bit of the
float64 sum, which the rounding removes. Small sums are gathered part by part and added up in a fixed order (`total`).
"""

import atexit
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.base.errors import SecateurError, StoppedError
from secateur.base.launcher import process_place

MAX_ENTRIES = 2**24
"""Largest number of entries sent at a time, as the transport copies them."""
START_TIMEOUT = timedelta(minutes=5)
"""Longest time that processes wait for each other to start."""
SOLVE_TIMEOUT = timedelta(days=7)
"""Longest time that processes wait for a solve. A process that dies ends the others at once: its connections close."""


class Processes:
    """Processes of one run; by default this one only.

    Attributes:
        rank: Number of this process; rank 0 reads and writes files and prints.
        size: Number of processes.
        bytes_moved: Bytes that this process has sent or received.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size, self.bytes_moved = rank, size, 0
        self._operations = [0.0] * size

    @classmethod
    def join(cls) -> "Processes":
        """Connect to the other processes that a launcher has started.

        Raises:
            SecateurError: The launcher's environment variables are wrong, or the other processes do not start.
        """
        place = process_place()
        if place.size > 1 and not dist.is_initialized():
            try:
                # Activations are sent from the CPU, sums from the device that holds them.
                backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
                store, rank, size = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
                dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=SOLVE_TIMEOUT)
            except (RuntimeError, ValueError, OSError) as error:
                reason = str(error).splitlines()[0]
                raise SecateurError(
                    f"process {place.rank} cannot reach the {place.size - 1} others ({reason}); start all processes at "
                    "once, and set MASTER_ADDR to an address that every machine can reach"
                ) from error
            atexit.register(dist.destroy_process_group)
        return cls(place.rank, place.size)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which reads and writes files and prints."""
        return self.rank == 0

    @property
    def is_single(self) -> bool:
        """Whether this process is the only one."""
        return self.size == 1

    def assign_owner(self, cost: float) -> int:
        """Return the owner rank of a solve with `cost` operations: the rank with the fewest operations so far."""
        rank = min(range(self.size), key=self._operations.__getitem__)
        self._operations[rank] += cost
        return rank

    def all_reduce(self, *tensors: Tensor) -> None:
        """Replace tensors by their sums over all processes."""
        self._over(tensors, dist.all_reduce)

    def reduce(self, owner: int, *tensors: Tensor) -> None:
        """Replace tensors by their sums at the owner rank; at other ranks their values are undefined afterwards."""
        self._over(tensors, lambda piece: dist.reduce(piece, owner))

    def total_tensors(self, *sums: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Return sums over all processes, rounded to the dtype of their parts.

        Args:
            sums: Sums of this process's parts in float64; overwritten.
            dtype: Dtype of the parts.
        """
        self.all_reduce(*sums)
        return [one.to(dtype) for one in sums]

    def gather(self, parts_pn: Tensor) -> Tensor:
        """Return the parts of all processes (parts x n), in an order that does not depend on which process has which.

        Args:
            parts_pn: Parts of this process; they may be none.
        """
        # Adding zero makes -0 to 0, as the sum over processes does.
        every = self._concatenated(parts_pn.cpu() + 0.0)
        # Any fixed order will do.
        order = sorted(range(len(every)), key=lambda part: blake2b(every[part].numpy().tobytes()).digest())
        return every[order].to(parts_pn.device)

    def _concatenated(self, local: Tensor) -> Tensor:
        """Return the rows of all processes, by rank."""
        if self.is_single:
            return local
        counts = self.all_gather(len(local))
        start = sum(counts[: self.rank])
        every = local.new_zeros(sum(counts), *local.shape[1:])
        every[start : start + len(local)] = local
        self.all_reduce(every)
        return every

    def total(self, parts: Iterable[float]) -> float:
        """Return the sum of numbers over all processes; see `gather`."""
        return float(self.gather(torch.tensor([*parts], dtype=torch.float64)).sum())

    def all_gather(self, value: int) -> list[int]:
        """Return the `value` of every process, by rank."""
        result = torch.zeros(self.size, dtype=torch.int64)
        result[self.rank] = value
        self.all_reduce(result)
        return [int(one) for one in result]

    def broadcast(self, make: Callable[[], Any], owner: int = 0) -> Any:
        """Return, at every rank, the value that `make` returns at the owner rank; it is sent as JSON."""
        if self.is_single:
            return make()
        text = json.dumps(make()).encode() if self.rank == owner else b""
        length = torch.tensor(len(text))
        self._spread(length, owner=owner)
        content = torch.empty(int(length), dtype=torch.uint8)
        if self.rank == owner:
            content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self._spread(content, owner=owner)
        return json.loads(content.numpy().tobytes())

    def broadcast_tensors(
        self, tensors: Mapping[str, Tensor] | None, owner: int, device: torch.device
    ) -> dict[str, Tensor]:
        """Return, at every rank, the tensors of the owner rank; other ranks pass None."""
        sent = {name: tensor.to(device).contiguous() for name, tensor in (tensors or {}).items()}
        if self.is_single:
            return sent
        layout = self.broadcast(
            lambda: [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in sent.items()], owner
        )
        if self.rank != owner:
            sent = {
                name: torch.empty(shape, dtype=getattr(torch, dtype), device=device) for name, dtype, shape in layout
            }
        self._spread(*sent.values(), owner=owner)
        return sent

    def compute_at(
        self, owner: int, make: Callable[[], Mapping[str, Tensor]], device: torch.device
    ) -> dict[str, Tensor]:
        """Compute tensors at the owner rank, and return them at every rank."""
        return self.broadcast_tensors(make() if self.rank == owner else None, owner, device)

    def send(self, piece: Tensor, source: int, to: int) -> Tensor:
        """Send a tensor from rank `source` to rank `to`, where it overwrites `piece`; other ranks do nothing."""
        if source != to and self.rank in (source, to):
            self.bytes_moved += piece.nbytes
            with connection_errors():
                if self.rank == source:
                    dist.send(piece, to)
                else:
                    dist.recv(piece, source)
        return piece

    def check_equal(self, values: Mapping[str, Any]) -> None:
        """Check that all processes have the same values.

        Raises:
            SecateurError: A value is not the one in process 0; the message names it.
        """
        local = json.loads(json.dumps(values))
        for name, value in self.broadcast(lambda: local).items():
            if local.get(name) != value:
                raise SecateurError(
                    f"{name} is {local.get(name)} here and {value} in process 0; give all processes the same options "
                    "and files"
                )

    def wait(self) -> None:
        """Wait until all processes have come as far as this one."""
        self.total(())

    @contextmanager
    def first_rank_first(self) -> Iterator[None]:
        """Let rank 0 finish a step, such as a download, before the other ranks begin it."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def _spread(self, *tensors: Tensor, owner: int) -> None:
        self._over(tensors, lambda piece: dist.broadcast(piece, owner))

    def _over(self, tensors: Iterable[Tensor], carry: Callable[[Tensor], Any]) -> None:
        """Apply a collective operation to tensors in place, in contiguous parts, one after the other."""
        for tensor in () if self.is_single else tensors:
            for part in _parts(tensor):
                piece = part.contiguous()
                self.bytes_moved += piece.nbytes
                with connection_errors():
                    carry(piece)
                if piece.data_ptr() != part.data_ptr():
                    part.copy_(piece)


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """Return parts of whole rows of a tensor, each of at most `MAX_ENTRIES` entries or one row."""
    if not tensor.numel():
        return []
    return [tensor] if tensor.numel() <= MAX_ENTRIES else tensor.split(max(1, MAX_ENTRIES // tensor[0].numel()))


@contextmanager
def connection_errors() -> Iterator[None]:
    """Turn the error of a broken connection into one for the user; other errors stay as they are."""
    try:
        yield
    except RuntimeError as error:
        # Gloo raises plain RuntimeErrors, which begin with the path of its source file.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise StoppedError(
            "another process of this run has stopped: fix the error that it printed, then run the same command again; "
            "the number of processes may change"
        ) from error
