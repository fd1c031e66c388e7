"""What a person sees while a command runs and after it: bars and notes on standard error, tables on standard output."""

import codecs
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from operator import length_hint
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import Any, NoReturn, TextIO, TypeVar, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from secateur.base.errors import SecateurError
from secateur.base.files import is_disk_full, write_atomically
from secateur.base.options import option
from secateur.base.output import Output
from secateur.report.plain import plain

T = TypeVar("T")

LOG_INTERVAL = 30.0
"""Seconds between two lines about one step, where there are no bars."""
EXIT_INTERRUPTED = 130
"""The exit code of shells for Ctrl-C."""

MESSAGES = "Messages"
"""The panel of options that every command has."""

IS_WORKER = os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"
"""Of several processes, the first speaks; the others only say what is wrong."""

log = Console(stderr=True, highlight=False, markup=False, quiet=IS_WORKER)


class _Forgiving:
    """A stream for remarks alone: what it does not take is lost, and the work goes on."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


SPELLED = {"█": "#", "·": ".", "±": "+-", "→": "->", **dict(zip("▁▂▃▄▅▆▇", "1234567", strict=True))}
"""Characters of tables and lines, and what stands for them where a stream's encoding lacks them."""


def _spelled(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace what a stream cannot encode: by other signs, bytes of a name by themselves, the rest by escapes."""
    assert isinstance(error, UnicodeEncodeError)
    found = error.object[error.start : error.end]
    if all("\udc80" <= sign <= "\udcff" for sign in found):
        return found.encode("ascii", "surrogateescape"), error.end
    return "".join(SPELLED.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in found), error.end


codecs.register_error("secateur", _spelled)


def settle_streams() -> None:
    """Let the work, its results and its exit code stand where standard error is full or closed, or an encoding poor."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Otherwise the next file that is opened takes the number, and gets what libraries write there.
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="secateur")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    elif sys.stderr is sys.__stderr__:
        sys.stderr = cast(TextIO, _Forgiving(cast(TextIO, sys.stderr)))


@dataclass(frozen=True)
class OutputOptions:
    """How a command talks."""

    json: Path | None = option(
        None,
        MESSAGES,
        "File for the results as JSON; - for standard output, in place of the table.",
        default_text="none",
    )
    quiet: bool = option(False, MESSAGES, "Say nothing on the way: no progress, no notes.")
    verbose: bool = option(
        False, MESSAGES, "Let the libraries' warnings through, and show where in the code an error arose."
    )

    @property
    def printed(self) -> bool:
        """JSON takes the table's place."""
        return str(self.json) == "-"


speech = OutputOptions()
"""Of the command that runs in this process."""


def set_output_options(how: OutputOptions, overwrite: bool) -> None:
    """Set how the command talks; a file that JSON could not be written to is refused before the work."""
    global speech
    speech, log.quiet = how, IS_WORKER or how.quiet
    logging.getLogger("secateur").setLevel(logging.DEBUG if how.verbose else logging.NOTSET)
    if how.json is not None and not how.printed:
        Output(how.json, suffix="", overwrite=overwrite).check()


class Bars:
    """Progress with time left, on standard error: bars on a terminal, a line now and then in a file."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """What each step has taken, in the order in which they began."""

    def track(self, items: Iterable[T], what: str, done: int = 0) -> Iterator[T]:
        """Show how far a loop is; so many items were done in an earlier run."""
        start = perf_counter()
        try:
            yield from self._drawn(items, what, done) if log.is_terminal else _told(items, what, done)
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + perf_counter() - start

    def _drawn(self, items: Iterable[T], what: str, before: int) -> Iterator[T]:
        columns = (
            TextColumn("{task.description:<10}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=log, transient=False) as progress:
            yield from progress.track(items, before + length_hint(items) or None, before, description=what)

    def times(self) -> str:
        """Where the time went, the longest step first; empty where nothing took a second."""
        longest = sorted(self.seconds.items(), key=lambda one: -one[1])
        return ", ".join(f"{what.lower()} {_clock(seconds)}" for what, seconds in longest if seconds >= 1)

    def note(self, text: str) -> None:
        """Print one line about a choice."""
        log.print(text, soft_wrap=True)

    def busy(self, what: str) -> AbstractContextManager[Any]:
        """Turn a spinner, on a terminal only."""
        # As text: a string would be read as markup, and a path may hold brackets.
        return log.status(Text(f"{what} ..."))

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Turn a spinner while libraries are imported, which end in a crash where an interrupt is raised within."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: found for number in numbers if callable(found := signal.getsignal(number))}
        with self.busy("Loading torch and transformers"):
            try:
                for number in before:
                    signal.signal(number, _leave)
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)


def _leave(*_: object) -> NoReturn:
    """End at once: nothing has been written yet."""
    log.show_cursor()
    log.print("interrupted: nothing is left half-written")
    os._exit(EXIT_INTERRUPTED)


def _told(items: Iterable[T], what: str, before: int) -> Iterator[T]:
    """Lines about a loop: every half minute, also while one item takes longer, and one at its end."""
    total, done, start, over = length_hint(items), 0, perf_counter(), Event()

    def say() -> None:
        elapsed = perf_counter() - start
        left = f", about {_clock(elapsed / done * (total - done))} left" if 0 < done < total else ""
        of = f" of {before + total}" if total else ""
        log.print(f"{what} {before + done}{of}, {_clock(elapsed)}{left}", soft_wrap=True)

    def ticks() -> None:
        while not over.wait(LOG_INTERVAL):
            say()

    Thread(target=ticks, daemon=True).start()
    try:
        for item in items:
            yield item
            done += 1
        say()
    finally:
        over.set()


def _clock(seconds: float) -> str:
    """A time as people write it."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def print_result(figures: Any, table: Table | None, lines: list[str], bars: Bars | None = None) -> None:
    """Print a result on standard output, and where the time went; files are written by then.

    Where JSON is asked for, that is made of `figures`.
    """
    console = Console(highlight=False, markup=False, quiet=IS_WORKER)
    times = bars.times() if bars else ""
    if (file := None if IS_WORKER else speech.json) is not None:
        found = json.dumps(plain(figures), indent=2)
        if speech.printed:
            table, lines, times = None, [found], ""
        else:
            write_atomically(file, f"{found}\n")
    try:
        if table is not None:
            console.print(table)
        for line in [*lines, f"Time: {times}."] if times else lines:
            console.print(line, soft_wrap=True)
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise output_is_full("; what was to be written to files is complete") from error


def output_is_full(more: str = "") -> SecateurError:
    """What to say of it; what is still in its buffer, which would fail once more at the end, is forgotten."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return SecateurError(f"standard output: the device is full{more}")


def exit_interrupted(state: str) -> NoReturn:
    """Stop after Ctrl-C, with one line about what is left on disk."""
    log.print(f"interrupted: {state}")
    sys.exit(EXIT_INTERRUPTED)
