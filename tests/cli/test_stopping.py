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


@pytest.fixture
def after_one_block(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Function that makes the work raise an exception after one block."""
    refit = fit_blocks.refit

    def arrange(error: BaseException) -> None:
        def one(*given: Any, **more: Any) -> Iterator[Any]:
            yield next(refit(*given, **more))
            raise error

        monkeypatch.setattr(fit_blocks, "refit", one)

    return arrange


@pytest.mark.parametrize("there", [False, True])
def test_an_interrupt_leaves_no_partial_output(there, place, run, after_one_block):
    if there:
        shutil.copytree(place / "model", place / "out")
    before = listing(place)
    after_one_block(KeyboardInterrupt())
    result = run("prune", "model", "out", *SMALL, *(["--overwrite"] if there else []))
    assert result.code == 130
    assert result.err.splitlines()[-1] == "interrupted: no partial output is left"
    assert without_run_state(place) == before
    assert run("clean", "out").code == 0
    assert listing(place) == before


def test_an_interrupt_during_imports_prints_no_traceback():
    """Some libraries crash if a KeyboardInterrupt is raised while they are imported."""
    code = (
        "import os, signal, sys\n"
        # Tests that run in the background ignore SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "library, number = sys.argv[1], int(sys.argv[2])\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == library:\n"
        "            os.kill(os.getpid(), number)\n"
        "            sum(range(1000))\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from secateur import cli\n"
        "sys.argv = ['secateur', 'families']\n"
        "cli.main()\n"
    )
    for name, number, ended in (("typer", signal.SIGINT, -signal.SIGINT), ("torch", signal.SIGTERM, 130)):
        command = [sys.executable, "-c", code, name, str(int(number))]
        result = subprocess.run(command, capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (ended, "")
        assert result.stderr == ("interrupted: no partial output is left\n" if ended > 0 else "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_and_sighup_leave_no_partial_output(number, place, monkeypatch):
    """A fork of this process is killed during the work; a terminal that is closed sends SIGHUP."""
    before, refit = listing(place), fit_blocks.refit

    def one(*given: Any, **more: Any) -> Iterator[Any]:
        yield next(refit(*given, **more))
        os.kill(os.getpid(), number)
        signal.pause()

    monkeypatch.setattr(fit_blocks, "refit", one)
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
    assert result.code == 2
    assert (
        result.err.splitlines()[-1]
        == "error: figures.json: the disk is full; free some space and run the same command again (nothing was written)"
    )
    assert listing(place) == before


@pytest.mark.parametrize(
    ("out", "left"),
    [
        ("out", ".out.partial-1a"),
        ("o.gguf", ".o.gguf.partial-1a"),
        ("o.gguf", ".o.gguf.folder-2b"),
        ("o.gguf", "..o.gguf.folder-2b.partial-1a"),
    ],
)
def test_files_of_a_killed_run_are_named(out, left, place, run, no_work):
    """Unfinished files of this output are reported before the work; unfinished files of another output are not."""
    for name in (left, f".other-{left}"):
        (place / name).mkdir()
    result = run("prune", "model", out, *SMALL, "--blocks", "9:12", *(["--format", "gguf"] if "." in out else []))
    assert [line for line in result.err.splitlines() if "left by" in line] == [
        f"{left} was left by a run that was killed; delete it, unless another run is writing it now"
    ]
