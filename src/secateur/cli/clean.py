"""`secateur clean`: delete what stopped runs have left."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.generate import expand_options
from secateur.cli.terminal import print_result


@expand_options
def clean(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Output of the stopped run; it is not deleted.", show_default=False)
    ],
) -> None:
    """Delete what stopped runs have left next to OUT: saved state and unfinished files.

    Example: secateur clean ./SmolLM2-pruned
    """
    from secateur.commands.clean import clean as run

    removed = run(out)
    lines = [f"Deleted {path}" for path in removed] or [
        f"Nothing to delete: no stopped run has left files next to {out}"
    ]
    print_result({"removed": removed}, None, lines)
