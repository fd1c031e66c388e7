"""Resume of a stopped run, if everything that decides its result is unchanged; smaller batches on a small device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

import secateur
from secateur.base.errors import SecateurError, StoppedError
from secateur.base.files import real_path
from secateur.base.hashes import hash_json, hash_rows
from secateur.base.run_folder import ROWS, RunFolder
from secateur.base.services import Services
from secateur.steps.open_model import OpenRun
from secateur.text.draw import CalibrationRows

Result = TypeVar("Result")
MIN_BATCH_TOKENS = 128
"""Smallest number of tokens in a batch."""


@contextmanager
def resumable(run: OpenRun, out: Path, command: str, **more: Any) -> Iterator[OpenRun]:
    """Yield the run with a run folder next to `out`, which holds the state of an earlier run if that was stopped.

    Everything that decides the result must be as it was then; see `check_rows` for the calibration rows.

    Args:
        run: The result of `open_model`.
        out: The output of the run.
        command: Name of the command.
        more: Further values that decide the result, by name.

    Raises:
        SecateurError: Another run is at work on the same output; the state is of a run with other options; or the
            processes of this run have different options.
    """
    options, family = asdict(run.options), run.run_options.family
    files = [options[name] for name in ("plan", "widths") if options[name] and Path(options[name]).is_file()]
    inputs = {
        "command": command,
        "model": run.stream.checkpoint.identity,
        **options,
        **{f"contents of {file}": _hash_of(Path(file)) for file in files},
        **({} if family is None else {"family": _hash_of(family)}),
        "dtype": str(run.dtype).removeprefix("torch."),
        **library_versions(),
        **more,
    }
    restart = run.run_options.restart and not run.services.has_retried
    with with_run_folder(run.services, out, inputs, restart=restart) as services:
        yield replace(run, stream=run.stream.using(run_folder=services.run_folder))


@contextmanager
def with_run_folder(services: Services, out: Path, inputs: dict[str, Any], *, restart: bool) -> Iterator[Services]:
    """Yield services with a run folder next to `out`, at rank 0.

    Args:
        services: The services of the run.
        out: The output of the run.
        inputs: Everything that decides the result, by the names that the user knows.
        restart: Delete the state of an earlier run.

    Raises:
        SecateurError: Another run is at work on the same output; the state is of a run with other inputs; or the
            processes of this run have different inputs.
    """
    if not services.processes.is_first:
        services.processes.check_equal(inputs)
        yield services
        return
    with RunFolder(real_path(out), inputs, restart=restart) as state:
        if state.has_results():
            services.watcher.note(f"Resuming a run that was stopped; its state is in {state.path}")
        services.processes.check_equal(inputs)
        try:
            yield replace(services, run_folder=state)
        except BaseException as error:
            if state.is_kept_after(error):
                again = "the same command without --restart" if restart else "the same command"
                services.watcher.note(f"The state of this run is in {state.path}; {again} resumes it")
            raise


def retry_in_smaller_batches(services: Services, command: Callable[[Services], Result]) -> Result:
    """Run a resumable command; each time the device runs out of memory, resume it with batches of half the size.

    Args:
        services: The resources of the run.
        command: Function of these resources.

    Raises:
        SecateurError: The device is out of memory with the smallest batches, or with several processes.
    """
    while True:
        try:
            return command(services)
        except torch.OutOfMemoryError as error:
            if not services.processes.is_single:
                # The other processes wait for this one, which cannot resume alone.
                raise StoppedError(
                    f"the device of process {services.processes.rank} is out of memory; use devices with more memory"
                ) from error
            if services.batch_tokens <= MIN_BATCH_TOKENS:
                raise SecateurError(
                    f"the device is out of memory even with {MIN_BATCH_TOKENS} tokens at a time; use a device with "
                    "more memory, or --device cpu"
                ) from error
        services = replace(services, batch_tokens=services.batch_tokens // 2, has_retried=True)
        services.watcher.note(f"The device is out of memory; resuming with {services.batch_tokens:,} tokens at a time")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide a result."""
    versions = {"secateur": secateur, "torch": torch, "transformers": transformers}
    return {f"version of {name}": library.__version__ for name, library in versions.items()}


def _hash_of(file: Path) -> str:
    """Return the hash of a text file."""
    return hash_json(file.read_text(encoding="utf-8", errors="replace"))


def check_rows(run: OpenRun, rows: CalibrationRows) -> None:
    """Check that the run that is resumed used the same calibration rows.

    Raises:
        SecateurError: The calibration text has changed.
    """
    parts = (rows.selection, rows.separate_refit, rows.held_out, rows.random)
    check_row_hashes(run.services, run.options.calibration, [hash_rows(part) for part in parts if part is not None])


def check_row_hashes(services: Services, source: str, hashes: list[str]) -> None:
    """Check that the run that is resumed used rows with the same hashes.

    Raises:
        SecateurError: The text `source` has changed.
    """
    if services.saved_result(ROWS, lambda: hashes) != hashes:
        raise SecateurError(
            f"{source}: the rows of this text are not the rows of the run that was stopped; restore "
            "the text, or add --restart to start over"
        )
