"""Model card and page of a pruned folder, README.md and report.html, both made from its record secateur.json."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from secateur.base.errors import SecateurError
from secateur.base.files import write_atomically
from secateur.base.quiet import first_line, quiet
from secateur.checkpoints.checkpoint import Checkpoint, open_checkpoint
from secateur.model.per_layer import empty_decoder
from secateur.report.card import BASE_CARD, CARD, PAGE, card
from secateur.report.model_page import model_page
from secateur.report.record_text import model_name
from secateur.write.record import RECORD, read_record

T = TypeVar("T")


def readme_and_report(source: Path, record: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return the contents of card and page by file name; those made from the record are functions.

    Args:
        source: Folder of the model before the run; the card of the dense model is copied from it.
        record: Returns the contents of secateur.json, once the run has finished.
    """
    base = read_text(source / (BASE_CARD if "sizes" in read_record(source) else CARD))
    files = {CARD: lambda: card(record(), base_card=base), PAGE: lambda: model_page(record())}
    return files if base is None else files | {BASE_CARD: base}


def read_text(path: Path) -> str | None:
    """Return the text of a file that others wrote, with invalid bytes replaced; None if there is no file."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def check_record(folder: Path) -> None:
    """Raise `SecateurError` if a folder has no record from which card and page can be made."""
    _from_record(folder, lambda record: (card(record), model_page(record)))


def check_base(folder: Path, base: str, *, trust_remote_code: bool = False) -> None:
    """Raise `SecateurError` if a folder was pruned from another model than `base`."""

    def read(record: Mapping[str, Any]) -> tuple[str, str, torch.dtype]:
        return model_name(record), record["fingerprint"], getattr(torch, record["options"]["dtype"] or "bfloat16")

    name, fingerprint, dtype = _from_record(folder, read)
    if fingerprint_of(open_checkpoint(base, dtype=dtype, trust_remote_code=trust_remote_code)) != fingerprint:
        raise SecateurError(
            f"{base}: {folder} was pruned from another model ({name}), with which the report must "
            "compare it; name that model in --against, or leave --report out"
        )


def fingerprint_of(checkpoint: Checkpoint) -> str:
    """Return the fingerprint of an open checkpoint as the record of a pruned folder has it."""
    # Checking shapes drops tensors that the model has no place for, which are not part of the fingerprint.
    with quiet(), suppress(SecateurError):
        checkpoint.check_shapes(empty_decoder(checkpoint))
    return checkpoint.fingerprint


def add_measurements(
    folder: Path, rows: Sequence[Sequence[str]], texts: Sequence[tuple[str, str, str]], notes: Sequence[str]
) -> None:
    """Write card and page of a pruned folder again, with measurements; see `model_page` for the arguments."""
    record = _record(folder)
    write_atomically(folder / CARD, card(record, base_card=read_text(folder / BASE_CARD), measured=rows, notes=notes))
    write_atomically(folder / PAGE, model_page(record, rows, texts, notes))


def _from_record(folder: Path, read: Callable[[Mapping[str, Any]], T]) -> T:
    """Return the result of a function of a folder's record, which may have been edited by hand.

    Raises:
        SecateurError: There is no record, or the function fails on it.
    """
    record = _record(folder)
    try:
        return read(record)
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise SecateurError(
            f"{folder / RECORD}: not a record that secateur prune wrote ({what}); restore the file, or delete it"
        ) from error


def _record(folder: Path) -> dict[str, Any]:
    found = read_record(folder)
    if "sizes" not in found:
        raise SecateurError(
            f"{folder}: secateur prune did not write this folder (no complete {RECORD}); leave --report out"
        )
    return found
