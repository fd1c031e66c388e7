"""A model of 2 GiB in less memory than it takes: `make test-larger`, for the night.

Each command runs in a control group of `LIMIT` bytes, which the system holds it to; where none can be made, under that
limit of the process's own data.
"""

from __future__ import annotations

import importlib
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from models import make_letters

LIMIT = 1536 * 2**20
LEAST = 2 * 2**30
DEPTH = 46


def benchmark(name: str) -> ModuleType:
    """A file of benchmarks/, which is no package."""
    folder = Path(__file__).parents[2] / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


scale = benchmark("scale")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "dense"
    folder.mkdir()
    scale.make(scale.Shape(width=2048, channels=2048, heads=32, groups=8, depth=DEPTH), DEPTH, folder)
    make_letters().save_pretrained(folder)
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) > LEAST > LIMIT
    return folder


@pytest.fixture(scope="module")
def group() -> Iterator[Path | None]:
    """What a process writes its number to, to be limited."""
    made = scale.bounded(LIMIT)
    yield made
    if made is not None:
        made.parent.rmdir()


def run(words: list[str], group: Path | None) -> str:
    """What a command prints."""

    def enter() -> None:
        if group is None:
            resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
        else:
            group.write_text(str(os.getpid()))

    command = [sys.executable, "-m", "secateur", *words]
    found = subprocess.run(command, capture_output=True, text=True, preexec_fn=enter)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_every_command(model: Path, group: Path | None, tmp_path: Path) -> None:
    # Of two blocks alone: all others are run through and copied, and the memory does not know the difference.
    rows = ["--calibration", "random", "--samples", "16", "--length", "64", "--blocks", "0:2", "--device", "cpu"]
    run(["survey", str(model), "--out", str(tmp_path / "survey"), *rows], group)
    asked = [*rows, "--effort", "quick", "--survey", str(tmp_path / "survey" / "survey.json")]
    run(["prune", str(model), str(tmp_path / "out"), *asked], group)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 200)
    said = run(["eval", str(model), "--perplexity", str(text), "--tokens", "512", "--device", "cpu"], group)
    assert "perplexity text.txt" in said
    run(["export", str(tmp_path / "out"), str(tmp_path / "out.gguf")], group)
    assert (tmp_path / "out.gguf").stat().st_size > LIMIT // 2
