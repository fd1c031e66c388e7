"""What several test files share: checkpoints of the tiny models, saved once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from models import save

collect_ignore = ["serving"]
"""Needs an environment of its own: `make test-vllm`."""

CheckpointFolder = Callable[[str], Path]


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFolder:
    """A row of `models.ROWS` as a folder; not to be changed."""
    saved: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in saved:
            saved[name] = save(name, tmp_path_factory.mktemp("dense") / name.replace(" ", "-"))
        return saved[name]

    return folder
