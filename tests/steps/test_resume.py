"""A stopped run resumes and writes the same bytes, or says why it cannot."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lives import bytes_of

import secateur.model.pass_checkpoint
from conftest import CheckpointFolder
from models import make_letters
from outputs import assert_error
from secateur import BlockStream, Options, prune
from secateur.base.cache import cached_folder
from secateur.base.json_files import read_hashed
from secateur.base.output import Output
from secateur.base.progress import Silent
from secateur.cli.clean import remove_state
from secateur.commands.survey import survey_page
from secateur.model.pass_checkpoint import PassCheckpoint
from secateur.steps import resume
from secateur.write.shards import ShardWriter

ASKED: dict[str, Any] = {"calibration": "random", "samples": 8, "length": 24, "device": "cpu"}
KILLED: dict[str, tuple[int, dict[str, Any]]] = {
    "a folder": (5, {}),
    "a file": (3, {"format": "gguf", "effort": "quick"}),
    "a size that is searched": (2, {"target": "ppl=1.2x", "effort": "quick"}),
}


@pytest.fixture(scope="module", autouse=True)
def _every_block_is_kept() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secateur.model.pass_checkpoint, "SPENT", float("inf"))
        yield


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory, checkpoint_folder: CheckpointFolder) -> dict[str, Any]:
    """Return the outcomes of all cases, which run in one process."""
    place = tmp_path_factory.mktemp("lives")
    model = shutil.copytree(checkpoint_folder("llama"), place / "dense")
    make_letters().save_pretrained(model)
    cases = place / "cases.json"
    cases.write_text(json.dumps({name: (points, ASKED | more) for name, (points, more) in KILLED.items()}))
    command = [sys.executable, str(Path(__file__).with_name("lives.py")), str(model), str(place), str(cases)]
    return json.loads(subprocess.check_output(command))


@pytest.mark.slow
@pytest.mark.parametrize("case", KILLED)
def test_killed_anywhere(case, lives):
    assert len(lives[case]) == KILLED[case][0]
    for one in lives[case]:
        assert one["killed"] == signal.SIGKILL, one
        assert one["same"], one
        assert not one["early"], one
        assert not one["left"], one


class Stopping(Silent):
    """Watcher that stops a step before one of its items, as Ctrl-C would."""

    def __init__(self, what: str = "Prune", item: int = 2, times: int = 1):
        self.what, self.item, self.times = what, item, times
        self.notes: list[str] = []
        self.seen: dict[str, list[Any]] = {}

    def track(self, items: Iterable[Any], what: str, done: int = 0) -> Iterator[Any]:
        for item in items:
            seen = self.seen.setdefault(what, [])
            if (what, item, seen.count(item)) == (self.what, self.item, self.times - 1):
                raise KeyboardInterrupt
            seen.append(item)
            yield item

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory: pytest.TempPathFactory, checkpoint_folder: CheckpointFolder) -> Path:
    """Return the state of a run that was stopped before its third block."""
    folder, watcher = tmp_path_factory.mktemp("stopped"), Stopping()
    with pytest.raises(KeyboardInterrupt):
        prune(checkpoint_folder("llama"), folder / "out", **ASKED, watcher=watcher)
    assert [file.name for file in folder.iterdir()] == [".out.run"]
    assert any("the same command resumes it" in note for note in watcher.notes)
    return folder / ".out.run"


@pytest.fixture
def stopped(tmp_path: Path, stopped_run: Path) -> Path:
    """Return the output of this run, with a copy of the state."""
    shutil.copytree(stopped_run, tmp_path / ".out.run")
    return tmp_path / "out"


def test_a_resumed_run_repeats_no_block(stopped, checkpoint_folder):
    (kept,) = stopped.with_name(".out.run").glob("fit-*/state.json")
    before = read_hashed(kept)["values"]["seconds"]
    watcher = Stopping(what="never")
    started = time.perf_counter()
    found = prune(checkpoint_folder("llama"), stopped, **ASKED, watcher=watcher)
    assert before < found.seconds < before + time.perf_counter() - started
    assert watcher.seen == {"Prune": [2]}
    assert any("Resuming a run" in note for note in watcher.notes)
    prune(checkpoint_folder("llama"), stopped.with_name("whole"), **ASKED)
    assert bytes_of(stopped) == bytes_of(stopped.with_name("whole"))
    assert sorted(file.name for file in stopped.parent.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"sparsity": 0.3}, "sparsity none, this command has 0.3"),
        ({"effort": "quick"}, "effort normal, this command has quick"),
        ({"dtype": "bfloat16"}, "dtype (float32|none), this command has bfloat16"),
        ({"format": "stock", "widths": "uniform"}, "widths adaptive, this command has uniform"),
    ],
)
def test_a_resume_with_other_options_is_refused(others, said, stopped, checkpoint_folder):
    before = bytes_of(stopped.with_name(".out.run"))
    said = f"({said}); use the same .* --restart"
    assert_error(said, prune, checkpoint_folder("llama"), stopped, **ASKED | others)
    assert bytes_of(stopped.with_name(".out.run")) == before


def test_a_resume_with_another_command_model_or_version_is_refused(stopped, checkpoint_folder, monkeypatch):
    said = "the unfinished run has command prune, this command has survey; .*--restart"
    assert_error(said, survey_page, checkpoint_folder("llama"), stopped, options=Options())
    said = r"the unfinished run has model .*, this command has .*--restart"
    assert_error(said, prune, checkpoint_folder("qwen3"), stopped, **ASKED)
    monkeypatch.setattr(resume.secateur, "__version__", "99")
    said = r"version of secateur .*, this command has 99; .*--restart"
    assert_error(said, prune, checkpoint_folder("llama"), stopped, **ASKED)


def test_a_resume_with_another_text_is_refused(tmp_path, checkpoint_folder):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(" ".join(f"w{number % 40}" for number in range(2000)))
    asked = ASKED | {"calibration": str(text)}
    with pytest.raises(KeyboardInterrupt):
        prune(checkpoint_folder("llama"), out, **asked, watcher=Stopping())
    text.write_text(" ".join(f"w{number % 39}" for number in range(2000)))
    said = r"text.txt: the rows of this text are not .*, or add --restart"
    assert_error(said, prune, checkpoint_folder("llama"), out, **asked)
    prune(checkpoint_folder("llama"), out, **asked, restart=True)


DAMAGED = ("request.json", "survey.json", "resampled.json", "state.json", "*.activations", ".shard-00001.partial")


@pytest.mark.parametrize("pattern", DAMAGED)
@pytest.mark.parametrize("how", ["a byte", "cut short"])
def test_a_damaged_state_is_refused(pattern, how, stopped, checkpoint_folder):
    (file,) = stopped.with_name(".out.run").rglob(pattern)
    data = bytearray(file.read_bytes())
    if how == "a byte":
        data[-5] ^= 4
        file.write_bytes(data)
    else:
        file.write_bytes(data[: len(data) // 2])
    assert_error(r"damaged, .* add --restart", prune, checkpoint_folder("llama"), stopped, **ASKED)
    assert not stopped.exists()
    if how == "cut short":
        prune(checkpoint_folder("llama"), stopped, **ASKED, restart=True)


def test_clean_removes_the_state(stopped, run):
    stopped.mkdir()
    (stopped / "kept").touch()
    with Output(stopped.parent / "new"):
        assert "another process is writing this; stop it first" in run("clean", str(stopped.parent / "new")).err
    (stopped.parent / "new").rmdir()
    for said in (r"Deleted .*\.out\.run", "Nothing to delete"):
        assert re.search(said, run("clean", str(stopped)).out)
    (replaced := stopped.with_name(".out.old-1a")).mkdir()
    # While there is no output, the folder that it was to replace is not deleted.
    stopped.rename(stopped.with_name("moved"))
    assert "Nothing to delete" in run("clean", str(stopped)).out
    stopped.with_name("moved").rename(stopped)
    assert f"Deleted {replaced}" in run("clean", str(stopped)).out
    assert [file.name for file in stopped.parent.rglob("*")] == ["out", "kept"]


def test_the_cache_is_cleared(tmp_path, run, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, old = (cached_folder(name, lambda folder: (folder / "file").write_bytes(bytes(2000))) for name in "ab")
    os.utime(old, (0, 0))
    assert cached_folder("c", lambda _: None).exists()
    assert first.exists()
    assert not old.exists()
    (first / "file").unlink()
    assert (cached_folder("a", lambda folder: (folder / "file").touch()) / "file").exists()
    assert "0.0 MB" in run("clean", "--cache").out
    assert not list(tmp_path.iterdir())
    assert "name the output of a stopped run, or add --cache" in run("clean").err


def test_a_second_run_on_the_same_output_is_refused(stopped, checkpoint_folder):
    with (stopped.with_name(".out.run") / "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for act in (lambda: prune(checkpoint_folder("llama"), stopped, **ASKED), lambda: remove_state(stopped)):
            assert_error("another run is using this folder; wait", act)
    remove_state(stopped)


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["activations", "weights"])
def test_a_run_resumes_after_the_disk_was_full(where, tmp_path, checkpoint_folder, monkeypatch):
    with monkeypatch.context() as patched:
        save, add = PassCheckpoint._save, ShardWriter.add

        def save_full(self: PassCheckpoint, done: int, *given: Any) -> None:
            if done == 2 and "shards" in self._savers:
                patched.setattr(os, "fsync", full)
            save(self, done, *given)

        def add_full(self: ShardWriter, name: str, tensor: Any) -> None:
            full() if "layers.2" in name else add(self, name, tensor)

        if where == "activations":
            patched.setattr(PassCheckpoint, "_save", save_full)
        else:
            patched.setattr(ShardWriter, "add", add_full)
        said = r"the disk is full; (make room|free some space) and run"
        assert_error(said, prune, checkpoint_folder("llama"), tmp_path / "out", **ASKED)
    assert not (tmp_path / "out").exists()
    watcher = Stopping(what="never")
    prune(checkpoint_folder("llama"), tmp_path / "out", **ASKED, watcher=watcher)
    assert watcher.seen["Prune"] == ([1, 2] if where == "activations" else [2])


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes blocks run out of memory with more than some number of tokens."""
    run = BlockStream.run

    def make(room: int, blocks: Container[int] = range(3)) -> None:
        def limited(self: BlockStream, index: int, layer: Any, hidden: Any, *given: Any, **named: Any) -> Any:
            if index in blocks and hidden.numel() // hidden.shape[-1] > room:
                raise torch.OutOfMemoryError
            return run(self, index, layer, hidden, *given, **named)

        monkeypatch.setattr(BlockStream, "run", limited)

    return make


@pytest.mark.parametrize(("room", "tried"), [(300, ["1,024", "512", "256"]), (30, ["1,024", "512", "256", "128"])])
def test_prune_uses_smaller_batches_on_a_small_device(room, tried, tmp_path, checkpoint_folder, small_device):
    """It says how many tokens run at a time, or that even the smallest batch does not fit."""
    small_device(room, [2])
    watcher, model, out = Stopping(what="never"), checkpoint_folder("llama"), tmp_path / "out"
    asked = ASKED | {"samples": 32, "watcher": watcher, "restart": True}
    if room < resume.MIN_BATCH_TOKENS:
        assert_error("out of memory even with 128 tokens at a time; use a device with", prune, model, out, **asked)
        # For another device to go on with.
        assert [file.name for file in tmp_path.iterdir()] == [".out.run"]
    else:
        prune(model, out, **asked)
        assert [file.name for file in tmp_path.iterdir()] == ["out"]
        # What was done before is not done again.
        assert watcher.seen["Resample"][:2] == [0, 1]
        assert watcher.seen["Resample"].count(0) == watcher.seen["Prune"].count(0) == 1
    said = [note for note in watcher.notes if "tokens at a time" in note]
    assert [note.split("with ")[1].split()[0] for note in said] == tried
