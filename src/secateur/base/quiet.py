"""Silencing of transformers and of the hub client while they load."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging import DEBUG, ERROR, getLogger

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from transformers.utils import logging


@contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings and progress bars of libraries, unless the logger `secateur` is at level DEBUG."""
    if getLogger("secateur").isEnabledFor(DEBUG):
        yield
        return
    verbosity, bars, no_hub_bars = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        are_progress_bars_disabled(),
    )
    # A change of the level makes Python look at every logger, which took as long as a forward pass of a tiny model.
    if verbosity != ERROR:
        logging.set_verbosity(ERROR)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if verbosity != ERROR:
            logging.set_verbosity(verbosity)
        if bars:
            # This enables the bars of the hub client, too, which may have been disabled before.
            logging.enable_progress_bar()
            if no_hub_bars:
                disable_progress_bars()


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message that is not blank, or else the name of its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
