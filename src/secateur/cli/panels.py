"""The panels into which a command's help sorts its options: each is a `typer.Option` that stands there."""

from __future__ import annotations

from functools import partial

import typer

target = partial(typer.Option, rich_help_panel="Target")
method = partial(typer.Option, rich_help_panel="Method")
calibration = partial(typer.Option, rich_help_panel="Calibration")
measured = partial(typer.Option, rich_help_panel="What to measure")
computing = partial(typer.Option, rich_help_panel="Computing")
output = partial(typer.Option, rich_help_panel="Output")
