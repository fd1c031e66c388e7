"""Progress with time left, on standard error: bars on a terminal, a line every half minute in a log file."""

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from operator import length_hint
from threading import Event, Thread
from time import perf_counter
from typing import Any, NoReturn, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from secateur.cli import terminal

T = TypeVar("T")

LOG_INTERVAL = 30.0
"""Seconds between two lines of one step where no bars are drawn."""


class Bars:
    """Progress output of the command line; see `secateur.base.progress.Watcher`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """Seconds of each step so far, in the order in which the steps began."""

    def track(self, items: Iterable[T], what: str, done: int = 0) -> Iterator[T]:
        """Yield the items and show how many of them are done, after `done` items of an earlier run."""
        start = perf_counter()
        self.seconds.setdefault(what, 0.0)
        try:
            yield from (_draw_bar if terminal.log.is_terminal else _log_lines)(items, what, done)
        finally:
            self.seconds[what] += perf_counter() - start

    def times(self) -> str:
        """Return the duration of each step that took at least a second, in order: `draw 0:03, prune 1:02`."""
        steps = self.seconds.items()
        return ", ".join(f"{what.lower()} {format_seconds(seconds)}" for what, seconds in steps if seconds >= 1)

    def note(self, text: str) -> None:
        """Print one line."""
        terminal.log.print(text, soft_wrap=True)

    def busy(self, what: str) -> AbstractContextManager[Any]:
        """Show a spinner, on a terminal only."""
        # `Text`, because a string would be read as markup, and a path may hold brackets.
        return terminal.log.status(Text(f"{what} ..."))

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Show a spinner while libraries are imported, and exit at once on an interrupt.

        A `KeyboardInterrupt` in the middle of an import would crash some libraries.
        """
        numbers = (signal.SIGINT, signal.SIGTERM)
        handlers = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
        with self.busy("Loading torch and transformers"):
            try:
                for number in handlers:
                    signal.signal(number, _exit_at_once)
                yield
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)


def _exit_at_once(*_: object) -> NoReturn:
    """Exit without cleaning up, as nothing has been written yet."""
    terminal.log.show_cursor()
    terminal.log.print("interrupted: no partial output is left")
    os._exit(terminal.EXIT_INTERRUPTED)


def _draw_bar(items: Iterable[T], what: str, before: int) -> Iterator[T]:
    """Yield the items and draw a bar."""
    name = TextColumn("{task.description:<10}", markup=False)
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=terminal.log) as progress:
        yield from progress.track(items, before + length_hint(items) or None, before, description=what)


def _log_lines(items: Iterable[T], what: str, before: int) -> Iterator[T]:
    """Yield the items; print a line every `LOG_INTERVAL` seconds, also during a long item, and one at the end."""
    total, done, start, over = length_hint(items), 0, perf_counter(), Event()

    def log_line() -> None:
        elapsed = perf_counter() - start
        left = f", about {format_seconds(elapsed / done * (total - done))} left" if 0 < done < total else ""
        of_total = f" of {before + total}" if total else ""
        terminal.log.print(f"{what} {before + done}{of_total}, {format_seconds(elapsed)}{left}", soft_wrap=True)

    def log_until_over() -> None:
        while not over.wait(LOG_INTERVAL):
            log_line()

    Thread(target=log_until_over, daemon=True).start()
    try:
        for item in items:
            yield item
            done += 1
        log_line()
    finally:
        over.set()


def format_seconds(seconds: float) -> str:
    """Return a duration as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
