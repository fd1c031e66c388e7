"""`secateur clean`: delete what stopped runs have left."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.base.errors import SecateurError
from secateur.base.files import is_held, leftovers, real_path, remove
from secateur.base.run_folder import RunFolder
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

    if out is None and not cache:
        raise SecateurError("nothing to delete: name the output of a stopped run, or add --cache")
    removed = [] if out is None else remove_state(out)
    lines = [f"Deleted {path}" for path in removed]
    if cache:
        folder, freed = clear_cache()
        removed.append(folder)
        lines.append(f"Deleted {folder}, {freed / 1e6:,.1f} MB")
    print_result(
        {"removed": removed}, None, lines or [f"Nothing to delete: no stopped run has left files next to {out}"]
    )


def remove_state(out: str | Path) -> list[Path]:
    """Remove the state of a stopped run and its unfinished files, but not the output itself.

    Args:
        out: The output of that run.

    Returns:
        The files and folders that were removed.

    Raises:
        SecateurError: A run is at work on this output.
    """
    if not (out := real_path(out)).name:
        raise SecateurError(f"{out}: not an output; name what --out or OUT was in the command that was stopped")
    if held := [left for left in leftovers(out) if is_held(left)]:
        raise SecateurError(f"{held[0]}: another process is writing this; stop it first")
    state = RunFolder(out, {})
    removed = [state.path] if state.path.exists() else []
    state.clean()
    for left in leftovers(out):
        remove(left)
        removed.append(left)
    return removed
