"""`clean`: remove what stopped runs have left beside an output."""

from pathlib import Path

from secateur.base.files import leftovers, local_path, remove
from secateur.base.run_folder import RunFolder


def clean(out: str | Path) -> list[Path]:
    """Remove the state of a run that was stopped, and files that were never finished; the output itself stays.

    Args:
        out: what the run was to make.

    Returns:
        What was removed.

    Raises:
        SecateurError: a run is at work there.
    """
    out = local_path(out).resolve()
    state = RunFolder(out, {})
    removed = [state.path] if state.path.exists() else []
    state.clean()
    for left in leftovers(out):
        remove(left)
        removed.append(left)
    return removed
