"""Silence for transformers and the hub client while they load, undone afterwards."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging import DEBUG, getLogger

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from transformers.utils import logging


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings below errors and no progress bars inside; what was set before holds again after.

    Where the logger `secateur` is to say everything, so may they.
    """
    if getLogger("secateur").isEnabledFor(DEBUG):
        yield
        return
    verbosity, bars, hub_silent = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        are_progress_bars_disabled(),
    )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            # This also switches the hub's bars on, which somebody may have switched off alone.
            logging.enable_progress_bar()
            if hub_silent:
                disable_progress_bars()


def first_line(error: BaseException) -> str:
    """An exception's message as one line, for a message of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
