"""Rows that models write for the runs of a comparison, kept in its folder: a restart reads them in place of writing.

Those are the calibration, where it is the model's own text, and the rewritten copies that the fits take. Either is
written once for all runs that would get the very same rows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import secateur
from secateur.base.errors import SecateurError
from secateur.base.files import hash_of
from secateur.base.progress import Silent
from secateur.commands.open import OpenRun
from secateur.compare.run_store import RunStore
from secateur.text.draw import CalibrationRows, draw
from secateur.text.sources import SELF

COPIES = "copies"


def with_own_text(run: OpenRun, rows: CalibrationRows, store: RunStore) -> CalibrationRows:
    """Rows with what the model writes in place of its stand-ins; as they are where it calibrates on a text.

    They always come out of the comparison's file, also where they were just written.

    Raises:
        SecateurError: the model cannot write, or the file was damaged.
    """
    if SELF not in run.options.sources:
        return rows
    request, bos = rows.request, rows.begins_with_bos
    names = ("source", "refit_source", "samples", "refit_samples", "length", "seed", "held_out")
    file = store.text_file(
        _decided_by(run) | {name: getattr(request, name) for name in names},
        lambda part: draw(run.stream, run.tokenizer, request, begins_with_bos=bos, save=part, watcher=run.watcher),
    )
    choose, refit = (str(file) if source == SELF else source for source in run.options.sources)
    kept = replace(request, source=choose, refit_source=refit)
    return replace(draw(run.stream, run.tokenizer, kept, begins_with_bos=bos, watcher=Silent()), request=request)


def with_kept_copies(run: OpenRun, rows: CalibrationRows, store: RunStore) -> CalibrationRows:
    """Rows with the rewritten copies that their fits take; as they are where they take none.

    Raises:
        SecateurError: the file was damaged.
    """
    if not rows.request.copies:
        return rows

    def rewrite(part: Path) -> None:
        copies = rows.with_copies(run.stream, run.watcher).copies
        assert copies is not None
        # Ids alone: a draw may fall on one that no tokenizer has a text for.
        save_file({COPIES: copies}, part)

    file = store.text_file(
        _decided_by(run) | {"text": hash_of(rows.fitted), "copies": rows.request.copies, "seed": rows.request.seed},
        rewrite,
        suffix=".safetensors",
    )
    try:
        return replace(rows, copies=load_file(file)[COPIES])
    except (SafetensorError, KeyError) as error:
        raise SecateurError(f"{file}: not rows of secateur's; delete it to have them made again") from error


def _decided_by(run: OpenRun) -> dict[str, str]:
    """What decides all that a model writes."""
    return {
        "secateur": secateur.__version__,
        "fingerprint": run.stream.checkpoint.fingerprint,
        "device": run.stream.device.type,
    }
