"""Interrupts, kills and full disks leave no partial output."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from command_line import SMALL, listing, without_run_state

from secateur import cli
from secateur.commands import fit_blocks


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.fixture
def after_one_block(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Function that makes the work call another function after one block."""
    refit = fit_blocks.refit

    def arrange(call: Callable[[], Any]) -> None:
        def one(*given: Any, **more: Any) -> Iterator[Any]:
            yield next(refit(*given, **more))
            call()

        monkeypatch.setattr(fit_blocks, "refit", one)

    return arrange


@pytest.mark.parametrize("there", [False, True])
def test_an_interrupt_leaves_no_partial_output(there, place, run, after_one_block):
    if there:
        shutil.copytree(place / "model", place / "out")
    before = listing(place)
    after_one_block(interrupt)
    result = run("prune", "model", "out", *SMALL, *(["--overwrite"] if there else []))
    assert result.code == 130
    assert result.err.splitlines()[-1] == "interrupted: no partial output is left"
    assert without_run_state(place) == before
    assert run("clean", "out").code == 0
    assert listing(place) == before


INTERRUPTED = """
import os, signal, sys
# Tests that run in the background ignore SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
library, number = sys.argv[1], int(sys.argv[2])
class Finder:
    def find_spec(self, name, *_):
        if name == library:
            os.kill(os.getpid(), number)
            sum(range(1000))
sys.meta_path.insert(0, Finder())
from secateur import cli
sys.argv = ["secateur", "families"]
cli.main()
"""


def test_an_interrupt_during_imports_prints_no_traceback():
    """Some libraries crash if a KeyboardInterrupt is raised while they are imported."""
    for name, number, ended in (("typer", signal.SIGINT, -signal.SIGINT), ("torch", signal.SIGTERM, 130)):
        command = [sys.executable, "-c", INTERRUPTED, name, str(int(number))]
        result = subprocess.run(command, capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (ended, "")
        assert result.stderr == ("interrupted: no partial output is left\n" if ended > 0 else "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_and_sighup_leave_no_partial_output(number, place, monkeypatch, after_one_block):
    """A fork of this process is killed during the work; a terminal that is closed sends SIGHUP."""
    before = listing(place)
    after_one_block(lambda: (os.kill(os.getpid(), number), signal.pause()))
    monkeypatch.setattr(sys, "argv", ["secateur", "prune", "model", "out", *SMALL])
    log = (place.parent / "log").open("w+")
    if not (child := os.fork()):
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        torch.set_num_threads(1)
        # Under nohup it is ignored, and stays so.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.alarm(120)
        try:
            cli.main()
        except SystemExit as ended:
            sys.stderr.flush()
            os._exit(int(ended.code or 0))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert (place.parent / "log").read_text().splitlines()[-1] == "interrupted: no partial output is left"
    assert without_run_state(place) == before


def test_a_disk_that_is_full_when_json_is_written(place, run, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = listing(place)
    result = run("eval", "model", "--json", "figures.json")
    message = "figures.json: the disk is full; free some space and run the same command again (nothing was written)"
    assert (result.code, result.err.splitlines()[-1]) == (2, f"error: {message}")
    assert listing(place) == before


LEFT = [("out", ".out.partial-1a"), ("o.gguf", ".o.gguf.folder-2b"), ("o.gguf", "..o.gguf.folder-2b.partial-1a")]


@pytest.mark.parametrize(("out", "left"), LEFT)
def test_files_of_a_killed_run_are_named(out, left, place, run, no_work):
    """Unfinished files of this output are reported before the work; unfinished files of another output are not."""
    for name in (left, f".other-{left}"):
        (place / name).mkdir()
    result = run("prune", "model", out, *SMALL, "--blocks", "9:12", *(["--format", "gguf"] if "." in out else []))
    assert [line for line in result.err.splitlines() if "left by" in line] == [
        f"{left} was left by a run that was killed; delete it, unless another run is writing it now"
    ]
