"""Recoveries: how the remaining weights compensate for removed units. One file holds one recovery of the same name."""

from pathlib import Path

_FOUND = sorted(file.stem for file in Path(__file__).parent.glob("[!_]*.py"))
NAMES = tuple(sorted(_FOUND, key=lambda name: name != "refit"))
"""Names of the recoveries in this folder, the default first."""
