"""Interrupts and kills leave no partial output."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from command_line import SMALL, listing, without_run_state

from secateur import cli
from secateur.steps import fit_blocks


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
