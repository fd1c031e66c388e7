"""A small file that appears whole or not at all, whenever the process ends."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, contents: str | bytes) -> None:
    """Write beside the target and put it in place; what was there is replaced.

    Raises:
        OSError: with the target's name, where there is no room; nothing is left then.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(contents.encode() if isinstance(contents, str) else contents)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        # Writing does not say where.
        raise OSError(error.errno, error.strerror, str(path)) from error
