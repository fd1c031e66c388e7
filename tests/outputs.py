"""What commands read and wrote, as tests change and see it: files, pages in a browser, notes and errors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.progress import Silent


def record_of(folder: Path) -> dict[str, Any]:
    """Return the secateur.json of a pruned folder."""
    return json.loads((folder / "secateur.json").read_text())


def weights_of(folder: Path) -> bytes:
    """Return the bytes of a folder's weights."""
    return (folder / "model.safetensors").read_bytes()


def edit_json(file: Path, **keys: Any) -> None:
    """Change keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@contextmanager
def edited_weights(folder: Path) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of a folder, and save them as they are afterwards."""
    tensors = load_file(folder / "model.safetensors")
    yield tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class Notes(Silent):
    """Watcher that keeps all notes."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


class Opened:
    """Page in a browser, with its errors and its network requests."""

    def __init__(self, browser: Any, file: Path, width: int = 1280, scheme: Any = "light"):
        self.context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        # A busy machine is no failure.
        self.context.set_default_timeout(180_000)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: Any) -> None:
        self.context.close()


def error_of(call: Callable[..., Any], *given: Any, **named: Any) -> str:
    """Return the message of the error that a call raises, after checking that it is one line."""
    with pytest.raises(SecateurError) as caught:
        call(*given, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_error(pattern: str, call: Callable[..., Any], *given: Any, **named: Any) -> None:
    """Check that a call raises an error whose one line contains a pattern."""
    message = error_of(call, *given, **named)
    assert re.search(pattern, message), message
