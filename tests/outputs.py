"""What a command wrote, as tests read it, and a watcher that keeps its notes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from secateur.base.progress import Silent


def record_of(folder: Path) -> dict[str, Any]:
    """Return the secateur.json of a pruned folder."""
    return json.loads((folder / "secateur.json").read_text())


def weights_of(folder: Path) -> bytes:
    """Return the bytes of a folder's weights."""
    return (folder / "model.safetensors").read_bytes()


class Notes(Silent):
    """Watcher that keeps all notes."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)
