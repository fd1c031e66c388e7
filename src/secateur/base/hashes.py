"""Short hashes, each of 16 hexadecimal digits."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def hash_json(value: Any) -> str:
    """Return the hash of a value that JSON can hold; the order of keys does not matter."""
    return _hash(json.dumps(value, sort_keys=True).encode())


def hash_rows(rows: Tensor) -> str:
    """Return the hash of token ids (rows × length), from their shape and their values."""
    return _hash(repr(tuple(rows.shape)).encode() + rows.numpy().tobytes())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
