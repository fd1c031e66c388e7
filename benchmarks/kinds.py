"""Helpers of the kinds of text: where the files are, and which half a document is in."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HALVES = ("calibration", "evaluation")

Document = dict[str, Any]
"""Line of a JSONL file, with the key `text` or `messages`, as secateur reads it."""


@dataclass(frozen=True)
class Folders:
    """Folders with the files that no Python package brings."""

    data: Path
    """Folder of WikiText-2, the Penn Treebank, C4 and the items of the zero-shot tasks."""
    unpacked: Path
    """Folder in which the packages of Debian and npm were unpacked."""


Kind = Callable[[Folders], Iterator[tuple[str, Document]]]
"""Function that yields the documents of one kind of text, each with the half that it is in."""


def half(name: str) -> str:
    """Return the half of a document; three quarters of the documents are for calibration."""
    return HALVES[sha256(name.encode()).digest()[0] % 4 == 0]


def packaged(package: str, path: str) -> Path:
    """Return a file inside a Python package, without importing the package."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: the first lines of texts.py say how to install it")
    return Path(next(iter(spec.submodule_search_locations))) / path
