"""Free memory of the machine, memory of this process, and amounts of memory such as `8GB`."""

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from secateur.base.errors import SecateurError
from secateur.base.launcher import process_place

UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
DEFAULT_SHARE = 0.5
"""Share of the free memory to use by default; the rest is for other programs."""
GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
LIMITS = {
    "": (GROUPS, "memory.max", "memory.current", "inactive_file"),
    "memory": (GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Places of the limits of memory in version 2 and in version 1 of control groups.

Folder of the groups, file with the limit of a group, and file with the memory that it uses. The last entry is the name
of the cached part in memory.stat; the system frees that part when memory is short.
"""


class MemoryBudget:
    """Bytes of memory that are shared by activations and weights; what does not fit is kept in files or read again."""

    def __init__(self, limit: int | None = None):
        """Create a budget of which nothing is used.

        Args:
            limit: Number of bytes; by default a quarter of the machine's memory.
        """
        self.limit = psutil.virtual_memory().total // 4 if limit is None else limit
        self.used = self.peak = 0

    def take(self, size: int) -> bool:
        """Take some bytes if they are left, and return whether they were."""
        fits = self.used + size <= self.limit
        self.used += size * fits
        self.peak = max(self.peak, self.used)
        return fits

    def give_back(self, size: int) -> None:
        """Give back bytes that were taken."""
        self.used -= size


def parse_memory(amount: str | None, available: int | None = None) -> int:
    """Return an amount of memory in bytes.

    Args:
        amount: A number with a unit, such as `8GB`, or a share of the free memory, such as `50%`; None for the default
            share.
        available: Number of bytes of which a share is taken; by default `available_bytes()`.

    Raises:
        SecateurError: The text is neither.

    Example:
        >>> parse_memory("1.5GiB")
        1610612736
    """
    available = available_bytes() if available is None else available
    if amount is None:
        return round(DEFAULT_SHARE * available)
    units = {unit.lower(): factor for unit, factor in UNITS.items() if unit} | {"%": available / 100}
    match = re.fullmatch(r"(\d+\.?\d*) *([a-z%]*)", str(amount).strip().lower())
    # An amount with more digits may be too large for a float.
    if match is None or match[2] not in units or len(match[1]) > 18 or (match[2] == "%" and float(match[1]) > 100):
        raise SecateurError(
            f"memory is '{amount}'; write an amount with a unit such as 8GB, or 50% for half of the free memory"
        )
    return round(float(match[1]) * units[match[2]])


def available_bytes() -> int:
    """Return how many bytes of memory this process can have: its present memory plus the free memory.

    The limits of its control groups are respected. Processes of one run on this machine share the memory equally.
    """
    processes = process_place().local_size
    own = processes * rss_bytes()
    return min([psutil.virtual_memory().available + own, *_group_bytes(own)]) // processes


def _group_bytes(own: int) -> Iterator[int]:
    """Yield how many bytes this run can have in every control group with a limit, of which it has `own` bytes now."""
    for group, limit, used, cached in _groups():
        # A group without a limit has no file, or a file with the word `max`.
        with suppress(OSError, ValueError):
            yield int((group / limit).read_text()) - _used_by_others(group, own, used, cached)


def _groups() -> Iterator[tuple[Path, str, str, str]]:
    """Yield the control groups of this process and the groups around them, each with the names of `LIMITS`."""
    with suppress(OSError):
        for line in OWN_GROUPS.read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers in LIMITS:
                root, limit, used, cached = LIMITS[controllers]
                group = root / name.lstrip("/")
                yield from ((folder, limit, used, cached) for folder in (group, *group.parents))


def _used_by_others(group: Path, own: int, used: str, cached: str) -> int:
    """Return the bytes that other processes use in a control group; for the file names see `LIMITS`."""
    with suppress(OSError, ValueError):
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, int((group / used).read_text()) - int(stat.get(cached, 0)) - own)
    return 0


def rss_bytes() -> int:
    """Return the resident memory of this process in bytes."""
    return int(psutil.Process(os.getpid()).memory_info().rss)


def release_freed_memory() -> None:
    """Make glibc return freed memory to the system; by default it keeps what was freed in the middle of its heap."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
