"""`clean`: remove what stopped runs left next to an output."""

from pathlib import Path

from secateur.base.errors import SecateurError
from secateur.base.files import is_held, leftovers, real_path, remove
from secateur.base.run_folder import RunFolder


def clean(out: str | Path) -> list[Path]:
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
