"""`secateur clean`: delete what stopped runs have left."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.generate import expand_options
from secateur.cli.terminal import print_result


@expand_options
def clean(
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="Output of the stopped run; it is not deleted.", show_default=False),
    ] = None,
    cache: Annotated[
        bool,
        typer.Option("--cache", help="Delete the user's cache: dequantised models, cut vocabularies, measured times."),
    ] = False,
) -> None:
    """Delete what stopped runs have left next to OUT (saved state and unfinished files), or the cache.

    Example: secateur clean ./SmolLM2-pruned
    """
    from secateur.base.cache import clear_cache
    from secateur.base.errors import SecateurError
    from secateur.commands.clean import clean as run

    if out is None and not cache:
        raise SecateurError("nothing to delete: name the output of a stopped run, or add --cache")
    removed = [] if out is None else run(out)
    lines = [f"Deleted {path}" for path in removed]
    if cache:
        folder, freed = clear_cache()
        removed.append(folder)
        lines.append(f"Deleted {folder}, {freed / 1e6:,.1f} MB")
    print_result(
        {"removed": removed}, None, lines or [f"Nothing to delete: no stopped run has left files next to {out}"]
    )
