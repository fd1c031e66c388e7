"""The command line: thin typer commands over the library, `secateur X` in `X.py`."""

import signal
import threading

_before = signal.getsignal(signal.SIGINT)
_plain = _before == signal.default_int_handler and threading.current_thread() is threading.main_thread()
if _plain:
    # Ctrl-C in the middle of the imports would end in a traceback through them.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from secateur.cli.app import main  # noqa: E402

if _plain:
    signal.signal(signal.SIGINT, _before)

__all__ = ["main"]
