"""Helpers for tests of the command line: a working folder, `secateur` run in this process, and checks of its output.

`tests/conftest.py` makes the fixtures available to all tests.
"""

import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console

from models import WORDS
from secateur import cli
from secateur.cli import terminal
from secateur.commands import plan, sizes, survey
from secateur.steps import fit_blocks, prune, survey_model, write_model

TEXT = " ".join(f"w{i * i % (WORDS - 4)}" for i in range(1500))
SMALL = ["--calibration", "text.txt", "--samples", "4", "--length", "16"]


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def place(tmp_path: Path, checkpoint_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder with a tiny Llama in `model` and a text in `text.txt`."""
    shutil.copytree(checkpoint_folder("llama"), tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Function that runs `secateur` with the given arguments in this process."""
    monkeypatch.setattr(terminal, "log", Console(file=None, stderr=True, highlight=False, markup=False, width=120))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(terminal, "output_options", terminal.OutputOptions())
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def call(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["secateur", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert isinstance(end.value.code, int)
        return Result(end.value.code, *capsys.readouterr())

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every slow step fail the test."""

    def reached(*_: Any, **__: Any) -> None:
        raise AssertionError("the error was found only after slow work")

    for module in (survey_model, fit_blocks, write_model, prune, plan, sizes, survey):
        for name in ("survey_model", "survey", "refit", "write", "write_model"):
            monkeypatch.setattr(module, name, reached, raising=False)


def listing(folder: Path) -> list[tuple[str, int]]:
    """Return every file below a folder with its size."""
    return sorted((str(file.relative_to(folder)), file.stat().st_size) for file in folder.rglob("*"))


def without_run_state(folder: Path) -> list[tuple[str, int]]:
    """Return the same without the state of a stopped run, which must exist."""
    kept = [entry for entry in listing(folder) if not entry[0].startswith(".out.run")]
    assert len(kept) < len(listing(folder))
    return kept


def refused(result: Result, message: str) -> None:
    """Check that a command ended with one line on standard error, which contains a message, and exit code 2."""
    assert result.code == 2, result
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1, result.err
    assert message in result.err


def remove_tokenizer(folder: Path) -> None:
    """Delete the tokenizer files of a model folder."""
    for file in folder.glob("tokenizer*"):
        file.unlink()
