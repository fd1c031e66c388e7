"""Resume of a stopped run: the options and files that decide its result, and smaller batches on a small device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

import secateur
from secateur.base.errors import SecateurError, StoppedError
from secateur.base.files import local_path
from secateur.base.hashes import hash_json, hash_rows
from secateur.base.run_folder import ROWS, RunFolder
from secateur.base.services import Services
from secateur.commands.open_model import OpenRun
from secateur.text.draw import CalibrationRows

R = TypeVar("R")
MIN_BATCH_TOKENS = 128
"""Fewest tokens of a batch."""


@contextmanager
def resumable(run: OpenRun, out: Path, **asked: Any) -> Iterator[OpenRun]:
    """Yield the run with a run folder beside `out`, and resume what an earlier run has left there.

    Args:
        run: from `open_model`.
        out: what the run makes.
        asked: what decides the result beside the run's own options.

    Raises:
        SecateurError: another run is at work there, or one that asked for something else was; processes of this run
            were given different things.
    """
    asked = result_inputs(run) | asked
    if not run.processes.is_first:
        run.processes.check_equal(asked)
        yield run
        return
    with RunFolder(local_path(out).resolve(), asked, restart=run.run_options.restart) as state:
        if state.has_results():
            run.watcher.note(f"Going on with a run that was stopped; its state is in {state.path}")
        run.processes.check_equal(asked)
        try:
            yield replace(run, stream=run.stream.using(run_folder=state))
        except BaseException as error:
            if state.is_kept_after(error):
                run.watcher.note(f"What is done is in {state.path}: the same command goes on from there")
            raise


def retry_in_smaller_batches(services: Services, command: Callable[[Services], R]) -> R:
    """Carry out a resumable command; where its device is out of memory, resume with half as many tokens a batch.

    Raises:
        SecateurError: the device is out of memory with the fewest tokens, or one of several processes is.
    """
    while True:
        try:
            return command(services)
        except torch.OutOfMemoryError as error:
            if not services.processes.is_single:
                # The other processes have got no further than this one, and wait.
                raise StoppedError(
                    f"the device of process {services.processes.rank} is out of memory; take devices with more"
                ) from error
            if services.batch_tokens <= MIN_BATCH_TOKENS:
                raise SecateurError(
                    f"the device is out of memory even with {MIN_BATCH_TOKENS} tokens at a time; take one with "
                    "more, or --device cpu"
                ) from error
        services = replace(services, batch_tokens=services.batch_tokens // 2)
        services.watcher.note(f"The device is out of memory: going on with {services.batch_tokens:,} tokens at a time")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def result_inputs(run: OpenRun) -> dict[str, Any]:
    """Return everything that decides the result, by option name; `check_rows` checks the calibration text itself."""
    asked = asdict(run.options)
    files = {name: asked[name] for name in ("plan", "widths") if asked[name] and Path(asked[name]).is_file()}
    family = run.run_options.family
    return {
        "model": run.stream.checkpoint.fingerprint,
        **asked,
        **{
            f"contents of {path}": hash_json(Path(path).read_text(encoding="utf-8", errors="replace"))
            for path in files.values()
        },
        **({} if family is None else {"family": hash_json(family.read_text(encoding="utf-8"))}),
        "dtype": str(run.dtype).removeprefix("torch."),
        "version of secateur": secateur.__version__,
        "version of torch": torch.__version__,
        "version of transformers": transformers.__version__,
    }


def check_rows(run: OpenRun, rows: CalibrationRows) -> None:
    """Check that the calibration rows are those of the run that is resumed.

    Raises:
        SecateurError: the text has changed.
    """
    parts = (rows.selection, rows.separate_refit, rows.held_out, rows.random)
    found = [hash_rows(part) for part in parts if part is not None]
    before = run.services.saved_result(ROWS, lambda: found)
    if before != found:
        raise SecateurError(
            f"{run.options.calibration}: other rows than the run that was stopped drew from it; restore the text, or "
            "add --restart to begin anew"
        )
