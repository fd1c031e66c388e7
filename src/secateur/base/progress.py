"""How long steps tell about their progress: the library is silent, the command line draws bars."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

from secateur.base.files import local_path

T = TypeVar("T")


class Watcher(Protocol):
    """Whoever waits: is handed the items of a long loop and passes them on."""

    def track(self, items: Iterable[T], what: str, done: int = 0) -> Iterator[T]:
        """Yield the items one by one; `what` says what is being done, and as many before them were `done` earlier."""

    def note(self, text: str) -> None:
        """Say one line about a choice that was made."""

    def busy(self, what: str) -> AbstractContextManager[Any]:
        """Show that a step of unknown length is under way; nothing is left of it."""


def busy_reading(watcher: Watcher, what: str, source: str) -> AbstractContextManager[Any]:
    """`busy` for what lies on disk; a download draws bars of its own, which a spinner would hide."""
    return watcher.busy(f"{what} {source}") if local_path(source).exists() else nullcontext()


class Silent:
    """Says nothing."""

    def track(self, items: Iterable[T], what: str, done: int = 0) -> Iterator[T]:
        """Yield the items one by one."""
        yield from items

    def note(self, text: str) -> None:
        """Swallow a line."""

    def busy(self, what: str) -> AbstractContextManager[Any]:
        """Show nothing."""
        return nullcontext()
