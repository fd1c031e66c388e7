"""What a log holds of a long run: a line now and then, with time left, and where the time went."""

import io
import re
import time

import pytest
from rich.console import Console

from secateur.cli import bars, terminal
from secateur.cli.bars import Bars


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    file = io.StringIO()
    monkeypatch.setattr(terminal, "log", Console(file=file, highlight=False, markup=False, width=80))
    return file


def test_a_long_loop_says_where_it_is(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "LOG_INTERVAL", 0.05)
    for _ in Bars().track(range(4), "Prune"):
        time.sleep(0.12)
    lines = log.getvalue().splitlines()
    # Also while one item takes longer than a line is due.
    assert lines[0] == "Prune 0 of 4, 0:00"
    assert any(re.fullmatch(r"Prune [123] of 4, 0:0\d, about 0:0\d left", line) for line in lines)
    assert re.fullmatch(r"Prune 4 of 4, 0:0\d", lines[-1])
    assert len(lines) >= 8


def test_a_short_loop_is_one_line(log: io.StringIO) -> None:
    assert list(Bars().track((letter for letter in "ab"), "Draw")) == ["a", "b"]
    assert log.getvalue() == "Draw 2, 0:00\n"


def test_names_are_no_markup(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "log", Console(file=log, force_terminal=True, markup=False, width=80))
    with Bars().busy("Opening models/[/bold]:smile:"):
        time.sleep(0.2)
    assert "Opening models/[/bold]:smile: ..." in log.getvalue()


def test_a_loop_that_fails_says_no_more(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "LOG_INTERVAL", 0.02)

    def broken() -> None:
        for _ in Bars().track(range(3), "Prune"):
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        broken()
    said = log.getvalue()
    time.sleep(0.1)
    assert log.getvalue() == said


def test_where_the_time_went() -> None:
    progress = Bars()
    progress.seconds = {"Survey": 61.2, "Price": 0.4, "Prune": 3725.0}
    assert progress.times() == "prune 1:02:05, survey 1:01"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", b"#6. 0.5 +- 0.1 \xff caf\\xe9 \\u4e00"),
        ("latin-1", b"#6\xb7 0.5 \xb1 0.1 \xff caf\xe9 \\u4e00"),
        ("utf-8", "█▆· 0.5 ± 0.1 ".encode() + b"\xff " + "café 一".encode()),
    ],
)
def test_what_an_encoding_lacks_is_shown_otherwise(encoding: str, shown: bytes) -> None:
    """Also names of files that are no UTF-8, which Python has as surrogates."""
    file = io.BytesIO()
    stream = io.TextIOWrapper(file, encoding=encoding, errors="secateur")
    stream.write("█▆· 0.5 ± 0.1 \udcff café 一")
    stream.flush()
    assert file.getvalue() == shown
