"""What tells one model's weights from another's, whatever their folders are called."""

from __future__ import annotations

import hashlib

from secateur.checkpoint import Checkpoint

SAMPLE = 4096
"""Bytes read from the middle of each tensor: fine-tuning changes all of them, and reading a whole model takes long."""


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of every tensor's name, shape, dtype and some of its bytes."""
    digest = hashlib.sha256()
    for name, info in sorted(checkpoint.tensors.items()):
        digest.update(f"{name}|{info.shape}|{info.dtype}|".encode())
        with info.file.open("rb") as file:
            file.seek(info.offset + max(0, (info.bytes - SAMPLE) // 2))
            digest.update(file.read(min(SAMPLE, info.bytes)))
    return digest.hexdigest()[:32]
