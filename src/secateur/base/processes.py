"""Processes that prune one model together.

Each has a share of the rows, with all their activations. Sums over rows are reduced across processes; a system is
solved by its owner rank alone, which broadcasts the solution. All processes run the same program and make the same
calls in the same order. Only plain tensors cross, JSON among them as bytes. Alone, a process has nothing to do here.
"""

import atexit
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.base.errors import SecateurError, StoppedError
from secateur.base.launcher import process_place

PIECE = 2**24
"""Entries that cross at a time: the transport takes as much memory again."""
MEETING = timedelta(minutes=5)
"""How long processes wait for each other to start."""
PATIENCE = timedelta(days=7)
"""How long they wait for a solve; one that dies closes its connections, which ends the others at once."""


class Processes:
    """The processes of one run; by default this one alone.

    Attributes:
        rank: number of this process; rank 0 reads, writes and speaks.
        size: number of processes.
        bytes_moved: bytes that this process has sent or received.
    """

    def __init__(self, rank: int = 0, size: int = 1, here: int = 1):
        self.rank, self.size, self.bytes_moved = rank, size, 0
        self._here = here
        self._loads = [0.0] * size

    @classmethod
    def join(cls) -> "Processes":
        """Connect to the other processes that a launcher has started.

        Raises:
            SecateurError: the launcher's variables are wrong, or the other processes do not start.
        """
        place = process_place()
        if place.size > 1 and not dist.is_initialized():
            try:
                # Activations cross on the host, statistics where they were summed.
                backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
                store, rank, size = next(dist.rendezvous("env://", timeout=MEETING))
                dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
            except (RuntimeError, ValueError, OSError) as error:
                reason = str(error).splitlines()[0]
                raise SecateurError(
                    f"process {place.rank} does not reach the {place.size - 1} others ({reason}); start all of them at "
                    "once, with an address that each machine reaches"
                ) from error
            atexit.register(dist.destroy_process_group)
        return cls(*place[:3])

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which reads, writes and speaks for all."""
        return self.rank == 0

    @property
    def is_single(self) -> bool:
        """Whether this process is the only one."""
        return self.size == 1

    def assign_owner(self, cost: float) -> int:
        """Return the owner rank of a solve of `cost` operations: the rank that has had the fewest so far."""
        rank = min(range(self.size), key=self._loads.__getitem__)
        self._loads[rank] += cost
        return rank

    def all_reduce(self, *tensors: Tensor) -> None:
        """Replace tensors by their sums over all processes."""
        self._over(tensors, dist.all_reduce)

    def reduce(self, owner: int, *tensors: Tensor) -> None:
        """Replace tensors by their sums at the owner rank; at other ranks their values are undefined afterwards."""
        self._over(tensors, lambda piece: dist.reduce(piece, owner))

    def total(self, value: float) -> float:
        """Return the sum of a number over all processes."""
        if self.is_single:
            return value
        result = torch.tensor(value, dtype=torch.float64)
        self.all_reduce(result)
        return float(result)

    def all_gather(self, value: int) -> list[int]:
        """Return the number that each process gives, by rank."""
        result = torch.zeros(self.size, dtype=torch.int64)
        result[self.rank] = value
        self.all_reduce(result)
        return [int(one) for one in result]

    def broadcast(self, make: Callable[[], Any], owner: int = 0) -> Any:
        """Return at all ranks the value that one rank makes; with several processes it crosses as JSON."""
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
        """Return the owner rank's tensors at all ranks; other ranks pass None."""
        if self.is_single:
            return dict(tensors or {})
        given = {name: tensor.contiguous() for name, tensor in (tensors or {}).items()}
        layout = self.broadcast(
            lambda: [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in given.items()], owner
        )
        if self.rank != owner:
            given = {
                name: torch.empty(shape, dtype=getattr(torch, kind), device=device) for name, kind, shape in layout
            }
        self._spread(*given.values(), owner=owner)
        return given

    def compute_at(
        self, owner: int, make: Callable[[], Mapping[str, Tensor]], device: torch.device
    ) -> dict[str, Tensor]:
        """Compute tensors at the owner rank, with all threads of its machine, and broadcast them."""
        made = None
        if self.rank == owner:
            with self._all_threads():
                made = make()
        return self.broadcast_tensors(made, owner, device)

    def send(self, piece: Tensor, source: int, to: int) -> Tensor:
        """Copy a tensor from one rank into that of another rank, in place; other ranks do nothing."""
        if source != to and self.rank in (source, to):
            self.bytes_moved += piece.nbytes
            with _talking():
                if self.rank == source:
                    dist.send(piece, to)
                else:
                    dist.recv(piece, source)
        return piece

    def check_equal(self, values: Mapping[str, Any]) -> None:
        """Check that all processes have the same values.

        Raises:
            SecateurError: a value differs from that of process 0; the error names it.
        """
        mine = json.loads(json.dumps(values))
        for name, value in self.broadcast(lambda: mine).items():
            if mine.get(name) != value:
                raise SecateurError(
                    f"{name} is {mine.get(name)} here and {value} in process 0; give all the same options and files"
                )

    @contextmanager
    def first_rank_first(self) -> Iterator[None]:
        """Let rank 0 finish a step, for example a download, before the other ranks begin it."""
        if not self.is_first:
            self.total(0.0)
        yield
        if self.is_first:
            self.total(0.0)

    def _spread(self, *tensors: Tensor, owner: int) -> None:
        self._over(tensors, lambda piece: dist.broadcast(piece, owner))

    def _over(self, tensors: Iterable[Tensor], carry: Callable[[Tensor], Any]) -> None:
        """Apply a collective operation to tensors in place, in contiguous parts, one at a time."""
        for tensor in () if self.is_single else tensors:
            for part in _parts(tensor):
                piece = part.contiguous()
                self.bytes_moved += piece.nbytes
                with _talking():
                    carry(piece)
                if piece.data_ptr() != part.data_ptr():
                    part.copy_(piece)

    @contextmanager
    def _all_threads(self) -> Iterator[None]:
        """Give this process the cores of the processes on its machine that wait for it."""
        before = torch.get_num_threads()
        if self._here > 1:
            torch.set_num_threads(before * self._here)
        try:
            yield
        finally:
            if self._here > 1:
                torch.set_num_threads(before)


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """Return a tensor in parts of whole rows; an empty tensor has none."""
    if not tensor.numel():
        return []
    return [tensor] if tensor.numel() <= PIECE else tensor.split(max(1, PIECE // tensor[0].numel()))


@contextmanager
def _talking() -> Iterator[None]:
    """Turn the error of a broken connection into a line for the user."""
    try:
        yield
    except RuntimeError as error:
        raise StoppedError(
            "another process of this run has stopped, and says why; mend that and run again, with as many processes as "
            "you like"
        ) from error
