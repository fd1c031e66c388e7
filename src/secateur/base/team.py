"""Several processes that prune one model together.

Each has a share of the rows, with all their activations. What is summed over rows is added up across processes; what is
solved from sums one process solves, and hands out. All processes run the same program and come to the same calls in the
same order. Only plain tensors cross, JSON among them as bytes. A process on its own has nothing to do here.
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
from secateur.base.launched import launched

PIECE = 2**24
"""Entries that cross at a time: what carries them takes as much memory again."""
MEETING = timedelta(minutes=5)
"""How long processes wait for each other to start."""
PATIENCE = timedelta(days=7)
"""How long they wait for a solve; one that dies closes its connections, which ends the others at once."""


class Team:
    """The processes of one run; by default this one alone.

    Attributes:
        rank: which of them this is; 0 reads, writes and speaks.
        size: how many there are.
        moved: bytes that this one has given or taken.
    """

    def __init__(self, rank: int = 0, size: int = 1, here: int = 1):
        self.rank, self.size, self.moved = rank, size, 0
        self._here = here
        self._loads = [0.0] * size

    @classmethod
    def join(cls) -> "Team":
        """Meet the other processes that a launcher has started.

        Raises:
            SecateurError: its variables are wrong, or the others do not come.
        """
        place = launched()
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
    def leads(self) -> bool:
        """Whether this process reads, writes and speaks for all."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self.size == 1

    def owner(self, cost: float) -> int:
        """Who solves what takes `cost` operations: whoever has had the least so far."""
        rank = min(range(self.size), key=self._loads.__getitem__)
        self._loads[rank] += cost
        return rank

    def add(self, *tensors: Tensor) -> None:
        """Put the sums over all processes in place."""
        self._over(tensors, dist.all_reduce)

    def add_at(self, owner: int, *tensors: Tensor) -> None:
        """Put the sums over all processes in place at the owner; elsewhere, what is there is of no use after it."""
        self._over(tensors, lambda piece: dist.reduce(piece, owner))

    def total(self, value: float) -> float:
        """The sum of a number over all processes."""
        if self.alone:
            return value
        result = torch.tensor(value, dtype=torch.float64)
        self.add(result)
        return float(result)

    def each(self, value: int) -> list[int]:
        """A number of every process."""
        result = torch.zeros(self.size, dtype=torch.int64)
        result[self.rank] = value
        self.add(result)
        return [int(one) for one in result]

    def told(self, make: Callable[[], Any], by: int = 0) -> Any:
        """What one process makes, at all of them; alone as it is, otherwise as JSON holds it."""
        if self.alone:
            return make()
        text = json.dumps(make()).encode() if self.rank == by else b""
        length = torch.tensor(len(text))
        self._spread(length, by=by)
        content = torch.empty(int(length), dtype=torch.uint8)
        if self.rank == by:
            content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self._spread(content, by=by)
        return json.loads(content.numpy().tobytes())

    def shared(self, tensors: Mapping[str, Tensor] | None, by: int, device: torch.device) -> dict[str, Tensor]:
        """One process's tensors at all of them; the others give None."""
        if self.alone:
            return dict(tensors or {})
        given = {name: tensor.contiguous() for name, tensor in (tensors or {}).items()}
        layout = self.told(
            lambda: [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in given.items()], by
        )
        if self.rank != by:
            given = {
                name: torch.empty(shape, dtype=getattr(torch, kind), device=device) for name, kind, shape in layout
            }
        self._spread(*given.values(), by=by)
        return given

    def solved(self, owner: int, make: Callable[[], Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
        """What the owner makes of sums, at all processes; meanwhile its machine has nothing else to do."""
        made = None
        if self.rank == owner:
            with self._all_threads():
                made = make()
        return self.shared(made, owner, device)

    def passed(self, piece: Tensor, source: int, to: int) -> Tensor:
        """A tensor of one process put in the place of another's; elsewhere nothing happens."""
        if source != to and self.rank in (source, to):
            self.moved += piece.nbytes
            with _talking():
                if self.rank == source:
                    dist.send(piece, to)
                else:
                    dist.recv(piece, source)
        return piece

    def agree(self, values: Mapping[str, Any]) -> None:
        """See that all processes have the same.

        Raises:
            SecateurError: they differ, with the name of what does.
        """
        mine = json.loads(json.dumps(values))
        for name, value in self.told(lambda: mine).items():
            if mine.get(name) != value:
                raise SecateurError(
                    f"{name} is {mine.get(name)} here and {value} in process 0; give all the same options and files"
                )

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Let the first process be through with something, a download perhaps, before the others begin with it."""
        if not self.leads:
            self.total(0.0)
        yield
        if self.leads:
            self.total(0.0)

    def _spread(self, *tensors: Tensor, by: int) -> None:
        self._over(tensors, lambda piece: dist.broadcast(piece, by))

    def _over(self, tensors: Iterable[Tensor], carry: Callable[[Tensor], Any]) -> None:
        """Let contiguous parts of tensors be changed in place, one at a time."""
        for tensor in () if self.alone else tensors:
            for part in _parts(tensor):
                piece = part.contiguous()
                self.moved += piece.nbytes
                with _talking():
                    carry(piece)
                if piece.data_ptr() != part.data_ptr():
                    part.copy_(piece)

    @contextmanager
    def _all_threads(self) -> Iterator[None]:
        """Let one process have the cores of those on its machine that wait for it."""
        before = torch.get_num_threads()
        if self._here > 1:
            torch.set_num_threads(before * self._here)
        try:
            yield
        finally:
            if self._here > 1:
                torch.set_num_threads(before)


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """A tensor in parts of whole rows; none where it is empty."""
    if not tensor.numel():
        return []
    return [tensor] if tensor.numel() <= PIECE else tensor.split(max(1, PIECE // tensor[0].numel()))


@contextmanager
def _talking() -> Iterator[None]:
    """Say in a line what a broken connection means."""
    try:
        yield
    except RuntimeError as error:
        raise StoppedError(
            "another process of this run has stopped, and says why; mend that and run again, with as many processes as "
            "you like"
        ) from error
