"""What a person sees while a command runs and after it: bars and notes on standard error, tables on standard output."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NoReturn, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

T = TypeVar("T")

INTERRUPTED = 130
"""The exit code of shells for Ctrl-C."""

log = Console(stderr=True, highlight=False, markup=False)


class Bars:
    """Progress bars with time left, on standard error."""

    def track(self, items: Iterable[T], what: str) -> Iterator[T]:
        """Draw one bar for a loop."""
        columns = (
            TextColumn("{task.description:<10}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=log, transient=False) as progress:
            yield from progress.track(items, description=what)

    def note(self, text: str) -> None:
        """Print one line about a choice."""
        log.print(text, soft_wrap=True)

    def busy(self, what: str) -> AbstractContextManager[Any]:
        """Turn a spinner, on a terminal only."""
        return log.status(f"{what} ...")


def show(table: Table, lines: list[str]) -> None:
    """Print a result on standard output."""
    console = Console(highlight=False, markup=False)
    console.print(table)
    for line in lines:
        console.print(line, soft_wrap=True)


def interrupted(state: str) -> NoReturn:
    """Stop after Ctrl-C, with one line about what is left on disk."""
    log.print(f"interrupted: {state}")
    sys.exit(INTERRUPTED)
