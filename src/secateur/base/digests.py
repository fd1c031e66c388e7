"""Short names for what decides a result, so that it is made once."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import Tensor


def digest(decided_by: dict[str, Any]) -> str:
    """A name for what decides a result, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()[:16]


def hash_of(rows: Tensor) -> str:
    """What tells rows (rows x length) from others, 16 hexadecimal digits."""
    return hashlib.sha256(repr(tuple(rows.shape)).encode() + rows.numpy().tobytes()).hexdigest()[:16]
