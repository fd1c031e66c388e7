"""How much memory there is, what this process has of it, and amounts as people write them."""

import ctypes
import os
import re
from contextlib import suppress
from pathlib import Path

import psutil

from secateur.base.errors import SecateurError
from secateur.base.launcher import process_place

UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
SHARE = 0.5
"""Of what is free, where nothing is said: others work here, too."""
GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
LIMITS = {"": (GROUPS, "memory.max"), "memory": (GROUPS / "memory", "memory.limit_in_bytes")}
"""Where the system says what a control group may take, in its second version and in its first."""


def parse_memory(allowed: str | None) -> int:
    """An amount of memory as a person writes it: `8GB`, or `50%` of what is free; half of it by default.

    Raises:
        SecateurError: it is none.

    Example:
        >>> parse_memory("1.5GiB")
        1610612736
    """
    if allowed is None:
        return round(SHARE * available_bytes())
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    match = re.fullmatch(r"(\d+\.?\d*) *([a-z%]*)", allowed.strip().lower())
    if match is None or match[2] not in (*units, "%"):
        raise SecateurError(f"memory is '{allowed}': write for example 8GB, or 50% of what is free")
    return round(float(match[1]) * (units[match[2]] if match[2] != "%" else available_bytes() / 100))


def available_bytes() -> int:
    """What this process may have: what it has and what is free, within the control groups that it is in.

    Processes of one run share it.
    """
    here = process_place().here
    found = psutil.virtual_memory().available + here * rss_bytes()
    with suppress(OSError):
        for line in OWN_GROUPS.read_text().splitlines():
            _, kind, own = line.split(":", 2)
            if kind in LIMITS:
                root, file = LIMITS[kind]
                place = root / own.lstrip("/")
                for group in (place, *place.parents):
                    # Where nothing is limited, the file says so in words, or there is none.
                    with suppress(OSError, ValueError):
                        found = min(found, int((group / file).read_text()))
    return found // here


def rss_bytes() -> int:
    """What this process has."""
    return int(psutil.Process(os.getpid()).memory_info().rss)


def release_freed_memory() -> None:
    """Let the C library give freed memory back to the system; glibc keeps what was freed in the middle of its heap."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
