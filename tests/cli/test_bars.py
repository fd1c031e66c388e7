"""Progress of long loops: lines in a log with the time left, and the duration of each step."""

import io
import re
import time
from contextlib import suppress

import pytest
from rich.console import Console

from secateur.cli import bars, terminal
from secateur.cli.bars import Bars


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
    assert len(lines) >= 8


def test_a_short_loop_is_one_line(log):
    assert list(Bars().track((letter for letter in "ab"), "Draw")) == ["a", "b"]
    assert log.getvalue() == "Draw 2, 0:00\n"


def test_brackets_in_names_are_not_markup(log, monkeypatch):
    monkeypatch.setattr(terminal, "log", Console(file=log, force_terminal=True, markup=False, width=80))
    with Bars().busy("Opening models/[/bold]:smile:"):
        time.sleep(0.2)
    assert "Opening models/[/bold]:smile: ..." in log.getvalue()


def test_a_loop_that_fails_stops_logging(log, monkeypatch):
    monkeypatch.setattr(bars, "LOG_INTERVAL", 0.02)

    with suppress(ValueError):
        for _ in Bars().track(range(3), "Prune"):
            raise ValueError
    said = log.getvalue()
    time.sleep(0.1)
    assert log.getvalue() == said


def test_times_lists_long_steps_in_order():
    progress = Bars()
    progress.seconds = {"Survey": 61.2, "Probe": 0.4, "Prune": 3725.0}
    assert progress.times() == "survey 1:01, prune 1:02:05"
