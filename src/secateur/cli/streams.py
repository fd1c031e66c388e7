"""Standard streams that never stop the work: closed or full standard error, and encodings that lack characters."""

import codecs
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from secateur.base.errors import SecateurError
from secateur.base.files import is_disk_full

SUBSTITUTES = {"█": "#", "·": ".", "±": "+-", "→": "->", **dict(zip("▁▂▃▄▅▆▇", "1234567", strict=True))}
"""ASCII text for the characters of our tables, for streams whose encoding lacks them."""


class LossyStream:
    """A text stream that drops text which nobody reads, and, if it is standard error, text which cannot be written."""

    def __init__(self, stream: TextIO, *, is_output: bool):
        self._stream, self._is_output = stream, is_output

    def write(self, text: str) -> int:
        """Write the text if possible; return its length in any case."""
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream if possible."""
        with self._dropping():
            self._stream.flush()

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            is_full, is_unread = self._is_output and is_disk_full(error), isinstance(error, BrokenPipeError)
            if is_full or is_unread:
                # Python would write the rest once more at exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if is_full:
                message = "standard output: the device is full; free some space or print elsewhere"
                raise SecateurError(message) from error
            if self._is_output and not is_unread:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def substitute(error: UnicodeError) -> tuple[str | bytes, int]:
    """Handle an encoding error (see `codecs.register_error`): return the replacement and where to continue.

    Characters of our tables become ASCII, undecodable bytes of file names stay as they are, and everything else becomes
    a backslash escape.
    """
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    if all("\udc80" <= character <= "\udcff" for character in text):
        return text.encode("ascii", "surrogateescape"), error.end
    escaped = (SUBSTITUTES.get(one) or one.encode("ascii", "backslashreplace").decode() for one in text)
    return "".join(escaped), error.end


codecs.register_error("secateur", substitute)


def protect_streams() -> None:
    """Make sure that the work and its exit code do not depend on standard error or on an encoding."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # Otherwise the next file to be opened would get this number, and the messages of libraries.
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="secateur")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    elif sys.stderr is sys.__stderr__:
        sys.stderr = cast(TextIO, LossyStream(cast(TextIO, sys.stderr), is_output=False))
    if sys.stdout is not None and sys.stdout is sys.__stdout__:
        sys.stdout = cast(TextIO, LossyStream(cast(TextIO, sys.stdout), is_output=True))
