"""The command line: one typer command over the library in each file, `secateur X` in `X.py`."""

import signal
import threading

_handler = signal.getsignal(signal.SIGINT)
_quiet_exit = _handler == signal.default_int_handler and threading.current_thread() is threading.main_thread()
if _quiet_exit:
    # Ctrl-C during the imports ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from secateur.cli.app import main  # noqa: E402

if _quiet_exit:
    signal.signal(signal.SIGINT, _handler)

__all__ = ["main"]
