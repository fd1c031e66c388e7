"""What a command wrote, as tests read it, a watcher that keeps its notes, and the message of an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secateur.base.errors import SecateurError
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


def error_of(call: Callable[..., Any], *given: Any, **named: Any) -> str:
    """Return the message of the error that a call raises, after checking that it is one line."""
    with pytest.raises(SecateurError) as caught:
        call(*given, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)
