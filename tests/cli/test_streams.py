"""Standard streams that are closed or full, encodings that lack characters, no home folder, and progress in a log."""

import io
import logging
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from command_line import SMALL, refused
from rich.console import Console

from secateur.cli import bars, terminal
from secateur.cli.bars import Bars


@pytest.mark.slow
def test_a_locale_of_ascii_and_a_home_that_cannot_be_written_break_nothing(place):
    """Characters beyond ASCII are in the bars and lines of a prune."""
    asked = ["prune", "model", "out", *SMALL, "--sparsity", "0.4", "--effort", "quick"]
    poor = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    # Not even root can write into this home.
    poor |= {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/cache", "HF_HOME": "/dev/null/hub"}
    command = [sys.executable, "-m", "secateur", *asked]
    result = subprocess.run(command, env=os.environ | poor, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    assert re.search(rb"attention *\|[1-8# ]{3}\|", result.stdout), result.stdout
    assert (place / "out" / "report.html").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
@pytest.mark.parametrize("asked", ["families", "--help"])
def test_a_full_standard_output_is_reported(asked):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "secateur", asked]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: standard output: the device is full")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("asked", ["families", "--help"])
def test_a_reader_may_stop_reading(asked):
    """As in `secateur families | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run([sys.executable, "-m", "secateur", asked], stdout=writer, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
def test_a_full_standard_error_changes_no_result(place, run, monkeypatch):
    """Messages are lost, but the work, its results and the exit code are the same."""
    command = ["eval", "model", "--perplexity", "text.txt", "--length", "16", "--tokens", "64", "--json", "-"]
    plain = run(*command)
    with suppress(OSError), Path("/dev/full").open("w") as full:
        for name in ("stderr", "__stderr__"):
            monkeypatch.setattr(sys, name, full)
        found, wrong = run(*command), run("eval", "nowhere/at/all")
    assert plain.err
    assert (found.code, found.out) == (plain.code, plain.out)
    assert found.code == 0
    assert (wrong.code, wrong.out) == (2, "")


def test_a_closed_standard_input_is_refused(place, run, monkeypatch, no_work):
    monkeypatch.setattr(sys, "stdin", None)
    result = run("prune", "model", "out", *SMALL, "--calibration", "-")
    refused(result, "standard input is closed: pipe a text in, or name a file")


def test_a_user_without_a_home_folder(place, run, no_work, monkeypatch, capsys):
    (place / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    refused(run("prune", "m.gguf", "out", *SMALL), "no home folder for a cache; set XDG_CACHE_HOME to a folder")
    logging.getLogger("matplotlib").warning("a temporary cache directory was made")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", b"#6. 0.5 +- 0.1 \xff caf\\xe9 \\u4e00"),
        ("latin-1", b"#6\xb7 0.5 \xb1 0.1 \xff caf\xe9 \\u4e00"),
        ("utf-8", "█▆· 0.5 ± 0.1 ".encode() + b"\xff " + "café 一".encode()),
    ],
)
def test_characters_that_an_encoding_lacks_are_substituted(encoding, shown):
    """File names that are not valid UTF-8, which Python represents by surrogates, are among them."""
    file = io.BytesIO()
    stream = io.TextIOWrapper(file, encoding=encoding, errors="secateur")
    stream.write("█▆· 0.5 ± 0.1 \udcff café 一")
    stream.flush()
    assert file.getvalue() == shown


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    file = io.StringIO()
    monkeypatch.setattr(terminal, "log", Console(file=file, highlight=False, markup=False, width=80))
    return file


def test_a_long_loop_logs_progress_and_time_left(log, monkeypatch):
    monkeypatch.setattr(bars, "LOG_INTERVAL", 0.05)
    for _ in Bars().track(range(4), "Prune"):
        time.sleep(0.12)
    lines = log.getvalue().splitlines()
    # Lines are logged during an item that takes longer than the interval, too.
    assert lines[0] == "Prune 0 of 4, 0:00"
    assert any(re.fullmatch(r"Prune [123] of 4, 0:0\d, about 0:0\d left", line) for line in lines)
    assert re.fullmatch(r"Prune 4 of 4, 0:0\d", lines[-1])
    shown = Bars()
    shown.seconds |= {"Survey": 61.0, "Draw": 0.5, "Prune": 2.0}
    assert shown.times() == "survey 1:01, prune 0:02"
    assert len(lines) >= 8
