"""Commands prune a model of 2 GiB in less memory than its weights take: `make test-larger`, which takes half an hour.

Each command runs in a control group of `LIMIT` bytes; where no control group can be made, with that limit on the data
segment of the process.
"""

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
    """Import a file of benchmarks/, which is not a package."""
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
    """Yield the file of a control group to which a process writes its id, or None."""
    made = scale.bounded(LIMIT)
    yield made
    if made is not None:
        made.parent.rmdir()


def run(words: list[str], group: Path | None) -> str:
    """Run a command inside the control group, and return its standard output."""

    def enter() -> None:
        if group is None:
            resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
        else:
            group.write_text(str(os.getpid()))

    command = [sys.executable, "-m", "secateur", *words]
    found = subprocess.run(command, capture_output=True, text=True, preexec_fn=enter)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_every_command_stays_within_the_limit(model, group, tmp_path):
    # Two blocks are pruned; the others are run and copied, which takes the same memory.
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
