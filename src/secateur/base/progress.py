"""Progress reports of long steps: the library is silent, the command line draws bars."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

from secateur.base.files import local_path

T = TypeVar("T")


class Watcher(Protocol):
    """Receiver of progress reports."""

    def track(self, items: Iterable[T], what: str, done: int = 0) -> Iterator[T]:
        """Yield the items of a long loop, and report how many are done.

        Args:
            items: Items of the loop.
            what: Name of the step.
            done: Number of items that an earlier run has done, which are not among `items`.
        """

    def note(self, text: str) -> None:
        """Report a choice or a finding in one line."""

    def busy(self, what: str) -> AbstractContextManager[Any]:
        """Report that a step of unknown length is running while the context is open."""


class Silent:
    """Watcher that reports nothing."""

    def track(self, items: Iterable[T], what: str, done: int = 0) -> Iterator[T]:
        """Yield the items."""
        yield from items

    def note(self, text: str) -> None:
        """Do nothing."""

    def busy(self, what: str) -> AbstractContextManager[Any]:
        """Do nothing."""
        return nullcontext()


def busy_reading(watcher: Watcher, what: str, source: str) -> AbstractContextManager[Any]:
    """Report that a local file or folder is being read; nothing for a download, which draws its own bars."""
    return watcher.busy(f"{what} {source}") if local_path(source).exists() else nullcontext()
