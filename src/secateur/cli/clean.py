"""`secateur clean`: what stopped runs have left."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.generate import expand_options
from secateur.cli.terminal import print_result


@expand_options
def clean(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="What the run was to make; it stays.", show_default=False)],
) -> None:
    """Remove what runs that were stopped have left beside OUT: their state, and files that were never finished.

    Example: secateur clean ./SmolLM2-pruned
    """
    from secateur.commands.clean import clean as run

    removed = run(out)
    lines = [f"Removed {path}" for path in removed] or [f"Nothing is left of a run beside {out}"]
    print_result({"removed": removed}, None, lines)
