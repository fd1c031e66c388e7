"""The command line: thin typer commands over the library, `secateur X` in `X.py`."""

from secateur.cli.app import main

__all__ = ["main"]
