"""Rank and number of processes, from the environment variables of a launcher such as torchrun."""

import os
from typing import NamedTuple

from secateur.base.errors import SecateurError

ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
ADVICE = "start all processes with torchrun, or unset WORLD_SIZE"


class ProcessPlace(NamedTuple):
    """Place of this process among the processes of a run."""

    rank: int = 0
    size: int = 1
    """Number of processes."""
    local_size: int = 1
    """Number of processes on this machine."""
    local_rank: int = 0
    """Rank among the processes on this machine."""


def process_place() -> ProcessPlace:
    """Return the place of this process; without a launcher it is the only one.

    Raises:
        SecateurError: An environment variable of the launcher is missing or wrong.
    """
    size = _read_number("WORLD_SIZE", 1, minimum=1)
    if size == 1:
        return ProcessPlace()
    if missing := [name for name in ("RANK", *ADDRESS) if not os.environ.get(name)]:
        raise SecateurError(f"WORLD_SIZE is {size}, but {' and '.join(missing)} are not set; {ADVICE}")
    rank = _read_number("RANK", 0, minimum=0)
    if rank >= size:
        raise SecateurError(f"RANK is {rank}, but WORLD_SIZE is {size}; {ADVICE}")
    return ProcessPlace(
        rank, size, _read_number("LOCAL_WORLD_SIZE", 1, minimum=1), _read_number("LOCAL_RANK", 0, minimum=0)
    )


def _read_number(name: str, default: int, *, minimum: int) -> int:
    """Return the whole number in an environment variable."""
    text = os.environ.get(name) or str(default)
    if not text.isascii() or not text.isdigit() or int(text) < minimum:
        raise SecateurError(f"{name} is '{text}', which is not a whole number of at least {minimum}; {ADVICE}")
    return int(text)
