"""What a launcher such as torchrun tells each of the processes that it starts, in environment variables."""

import os
from typing import NamedTuple

from secateur.base.errors import SecateurError

ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
ADVICE = "start all processes with torchrun, or unset WORLD_SIZE"


class ProcessPlace(NamedTuple):
    """A process among those of one run."""

    rank: int = 0
    size: int = 1
    here: int = 1
    """How many of them run on this machine."""
    local: int = 0
    """Which of these it is."""


def process_place() -> ProcessPlace:
    """Which process this is; the only one where no launcher says otherwise.

    Raises:
        SecateurError: variables are missing, or make no sense.
    """
    size = _number("WORLD_SIZE", 1, 1)
    if size == 1:
        return ProcessPlace()
    if missing := [name for name in ("RANK", *ADDRESS) if not os.environ.get(name)]:
        raise SecateurError(f"WORLD_SIZE is {size}, but {' and '.join(missing)} are not set; {ADVICE}")
    rank = _number("RANK", 0, 0)
    if rank >= size:
        raise SecateurError(f"RANK is {rank}, but WORLD_SIZE is {size}; {ADVICE}")
    return ProcessPlace(rank, size, _number("LOCAL_WORLD_SIZE", 1, 1), _number("LOCAL_RANK", 0, 0))


def _number(name: str, usual: int, least: int) -> int:
    text = os.environ.get(name) or str(usual)
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise SecateurError(f"{name} is '{text}', which is no number from {least} on; {ADVICE}")
    return int(text)
