"""What models write for the runs of a comparison, kept in its folder: a restart reads it in place of writing anew.

That is the calibration, where it is the model's own text, and the rows that the fits take beside it. Either is written
once for all runs that would get the very same rows.
"""

from __future__ import annotations

from dataclasses import replace

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import secateur
from secateur.base.digests import hash_of
from secateur.base.errors import SecateurError
from secateur.base.progress import Silent, Watcher
from secateur.commands.open import Job
from secateur.commands.options import SELF
from secateur.compare.run_store import RunStore
from secateur.text.draw import draw
from secateur.text.more_rows import more_rows

ROWS = "rows"
_DECIDES = ("calibration", "refit_calibration", "samples", "refit_samples", "length", "temperature", "seed", "searches")


def with_own_text(job: Job, store: RunStore, watcher: Watcher) -> Job:
    """An open job with the rows that its model writes; as it is where it calibrates on a text.

    Args:
        job: opened dry, so that other rows stand in for what the model writes.
        store: the folder of the comparison. Rows always come out of its file, also where they were just written.
        watcher: told about progress.

    Raises:
        SecateurError: the model cannot write, or the file was damaged.
    """
    options, stream = job.options, job.stream
    if SELF not in options.sources:
        return job
    tokenizer = stream.checkpoint.tokenizer()
    file = store.text_file(
        {
            "secateur": secateur.__version__,
            "fingerprint": stream.checkpoint.fingerprint,
            "device": stream.device.type,
            **{name: getattr(options, name) for name in _DECIDES},
        },
        lambda part: draw(stream, tokenizer, options, save=part, dry=False, watcher=watcher),
    )
    choose, refit = (str(file) if source == SELF else source for source in options.sources)
    kept = replace(
        options,
        calibration=choose,
        refit_calibration=options.refit_calibration and refit,
        temperature=1.0,
    )
    return replace(job, drawn=draw(stream, tokenizer, kept, save=None, dry=False, watcher=Silent()))


def with_kept_rows(job: Job, store: RunStore, watcher: Watcher) -> Job:
    """An open job with the rows that its fits take beside the text's; as it is where they take none.

    Args:
        job: with the text that it calibrates on.
        store: the folder of the comparison. Rows always come out of its file, also where they were just written.
        watcher: told about progress.

    Raises:
        SecateurError: the model cannot write, or the file was damaged.
    """
    options, stream = job.options, job.stream
    if not options.fits_more:
        return job
    # Ids alone: a draw may fall on one that no tokenizer has a text for.
    file = store.text_file(
        {
            "secateur": secateur.__version__,
            "fingerprint": stream.checkpoint.fingerprint,
            "device": stream.device.type,
            "text": hash_of(job.fitted),
            "more": options.more,
            "temperature": options.temperature,
            "fits": options.fits,
            "seed": options.seed,
        },
        lambda part: save_file({ROWS: more_rows(stream, options, job.fitted, watcher=watcher)}, part),
        suffix=".safetensors",
    )
    try:
        return replace(job, more=load_file(file)[ROWS])
    except (SafetensorError, KeyError) as error:
        raise SecateurError(f"{file}: not rows of secateur's; delete it to have them made again") from error
