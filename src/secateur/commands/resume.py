"""A run that goes on where it was stopped: what decides its result, and who may go on with it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import torch
import transformers

import secateur
from secateur.base.errors import SecateurError, StoppedError
from secateur.base.files import digest, hash_of, local_path
from secateur.base.launched import launched
from secateur.base.progress import Silent, Watcher
from secateur.base.run_folder import ROWS, RunFolder
from secateur.commands.open import OpenRun
from secateur.model import rows as batches
from secateur.text.draw import CalibrationRows

P = ParamSpec("P")
R = TypeVar("R")
LEAST = 128
"""Tokens at a time."""


@contextmanager
def resumable(run: OpenRun, out: Path, **asked: Any) -> Iterator[OpenRun]:
    """The run with a place for its state beside `out`; what an earlier one has kept there is gone on with.

    Args:
        run: from `open_model`.
        out: what the run makes.
        asked: what decides the result beside the run's own options.

    Raises:
        SecateurError: another run is at work there, or one that asked for something else was; processes of this run
            were given different things.
    """
    asked = decided_by(run) | asked
    if not run.team.leads:
        run.team.agree(asked)
        yield run
        return
    with RunFolder(local_path(out).resolve(), asked, restart=run.running.restart) as state:
        if state.holds_work():
            run.watcher.note(f"Going on with a run that was stopped; its state is in {state.path}")
        run.stream.scratch = state.path
        run.team.agree(asked)
        try:
            yield replace(run, state=state)
        except BaseException as error:
            if state.outlives(error):
                run.watcher.note(f"What is done is in {state.path}: the same command goes on from there")
            raise
        finally:
            run.stream.scratch = None


def in_smaller_batches(command: Callable[P, R]) -> Callable[P, R]:
    """Let a resumable command go on with half of the tokens at a time, again and again, where its device has no memory.

    It raises `SecateurError` where even the fewest are too many.
    """

    @wraps(command)
    def going_on(*given: P.args, **named: P.kwargs) -> R:
        usual, watcher = batches.BATCH_TOKENS, cast("Watcher", named.get("watcher") or Silent())
        try:
            while True:
                try:
                    return command(*given, **named)
                except torch.OutOfMemoryError as error:
                    if launched().size > 1:
                        # The others have got no further than this one, and wait.
                        raise StoppedError(
                            f"the device of process {launched().rank} is out of memory; take devices with more"
                        ) from error
                    if batches.BATCH_TOKENS <= LEAST:
                        raise SecateurError(
                            f"the device is out of memory even with {LEAST} tokens at a time; take one with more, or "
                            "--device cpu"
                        ) from error
                    batches.BATCH_TOKENS //= 2
                watcher.note(f"The device is out of memory: going on with {batches.BATCH_TOKENS:,} tokens at a time")
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        finally:
            batches.BATCH_TOKENS = usual

    return going_on


def decided_by(run: OpenRun) -> dict[str, Any]:
    """Everything that decides what a run gives, by the names of the options; the text itself is checked once read."""
    asked = asdict(run.options)
    files = {name: asked[name] for name in ("plan", "widths") if asked[name] and Path(asked[name]).is_file()}
    return {
        "model": run.stream.checkpoint.fingerprint,
        **asked,
        **{
            f"contents of {path}": digest(Path(path).read_text(encoding="utf-8", errors="replace"))
            for path in files.values()
        },
        **({} if run.running.family is None else {"family": digest(run.running.family.read_text(encoding="utf-8"))}),
        "dtype": str(run.dtype).removeprefix("torch."),
        "version of secateur": secateur.__version__,
        "version of torch": torch.__version__,
        "version of transformers": transformers.__version__,
    }


def check_rows(run: OpenRun, rows: CalibrationRows) -> None:
    """See that the rows are those of the run that is gone on with.

    Raises:
        SecateurError: the text has changed.
    """
    found = [hash_of(part) for part in (rows.text, rows.refit_text, rows.held_out, rows.random) if part is not None]
    before = run.once(ROWS, lambda: found)
    if before != found:
        raise SecateurError(
            f"{run.options.calibration}: other rows than the run that was stopped drew from it; restore the text, or "
            "add --restart to begin anew"
        )
