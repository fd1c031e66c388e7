"""Recoveries, one a file, which is called as they are."""

from pathlib import Path

NAMES = tuple(sorted((file.stem for file in Path(__file__).parent.glob("[!_]*.py")), key=lambda name: name != "refit"))
"""Names of all that are here, the default first."""
