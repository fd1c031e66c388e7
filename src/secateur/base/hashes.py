"""Hashes."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def hash_json(decided_by: Any) -> str:
    """A short name for what decides a result, as JSON holds it, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()[:16]


def hash_rows(rows: Tensor) -> str:
    """What tells rows (rows x length) from others, 16 hexadecimal digits."""
    return hashlib.sha256(repr(tuple(rows.shape)).encode() + rows.numpy().tobytes()).hexdigest()[:16]
