"""The rows of a run: which come from where, and what each of them is for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.progress import Watcher, reading
from secateur.commands.options import SELF, Options
from secateur.model.checkpoint import Checkpoint
from secateur.model.stream import BlockStream
from secateur.plan.meters import cache_meter
from secateur.plan.search import HELD_OUT
from secateur.text.calibration import calibration_rows, check_calibration
from secateur.text.documents import RANDOM
from secateur.text.row_file import check_new, write_rows
from secateur.text.self_calibration import check_self, self_rows


@dataclass(frozen=True)
class Drawn:
    """Token rows, each of them rows x length."""

    text: Tensor
    """Of the calibration source, by which widths and units are chosen."""
    held_out: Tensor | None
    """Other rows of the same source, where a loss is to be measured."""
    fitted: Tensor | None
    """What weights are fitted to, where that is not `text`."""
    sigma: Tensor | None
    """Random ids by which units are chosen in place of `text`."""


def check_sources(options: Options, save: Path | None) -> None:
    """What can be found wrong with the sources before a model is opened.

    Raises:
        SecateurError: see `draw`.
    """
    for source in dict.fromkeys(options.sources):
        check_calibration(source, samples=options.samples, length=options.length)
    if save is not None:
        if SELF not in options.sources:
            raise SecateurError(
                "--save-calibration keeps what the model writes: add --calibration self or --refit-calibration self"
            )
        check_new(save)


def check_writing(stream: BlockStream, tokenizer: Any, options: Options) -> None:
    """See that the model can write its own rows, where it is to.

    Raises:
        SecateurError: see `check_self`.
    """
    if options.writes:
        cached = cache_meter(stream, stream.checkpoint.dtype).dense
        check_self(stream.checkpoint, tokenizer, length=options.length, cache_bytes=cached, device=stream.device)


def draw(
    stream: BlockStream, tokenizer: Any, options: Options, *, save: Path | None, dry: bool, watcher: Watcher
) -> Drawn:
    """Read, draw or write all rows of a run.

    Where the refit has rows of its own and the same source, all come out of one draw: no token is used twice.

    Args:
        stream: the open model.
        tokenizer: its tokenizer.
        options: the request.
        save: a new file for the rows that the model writes.
        dry: only the number of rows matters: random ids stand for what the model would write.
        watcher: told about progress.

    Raises:
        SecateurError: a source that cannot be read or is too short, or a model that cannot write.
    """
    held, apart = HELD_OUT * options.searches, options.refit_samples or options.samples
    own = options.own_refit_rows
    source, other = options.sources
    together = apart if own and other == source else 0

    def rows(source: str, count: int, option: str, taken: int = 0) -> Tensor:
        return _rows(stream, tokenizer, options, source, count, option, taken, save, dry, watcher)

    choose = options.samples + held
    if together:
        first = rows(source, choose + together, "refit-samples", choose)
    else:
        first = rows(source, choose, "samples", held)
    text, held_out, fitted = first.split([options.samples, held, together])
    if own and not together:
        fitted = rows(other, apart, "refit-samples" if options.refit_samples else "samples")
    sigma = rows(RANDOM, options.samples, "samples") if options.sigma == "random" else None
    return Drawn(text, held_out if held else None, fitted if own else None, sigma)


def _rows(
    stream: BlockStream,
    tokenizer: Any,
    options: Options,
    source: str,
    count: int,
    option: str,
    taken: int,
    save: Path | None,
    dry: bool,
    watcher: Watcher,
) -> Tensor:
    """Rows of one source; `option` is what a person calls their number, `taken` of them aside."""
    checkpoint: Checkpoint = stream.checkpoint
    if source == SELF and not dry:
        rows = self_rows(
            checkpoint,
            tokenizer,
            samples=count,
            length=options.length,
            seed=options.seed,
            temperature=options.temperature,
            device=stream.device,
            watcher=watcher,
        )
        if save is not None:
            write_rows(save, rows, tokenizer)
        return rows
    if source == SELF:
        watcher.note(f"To write its own text, the model is first loaded whole: {checkpoint.bytes / 1e9:,.2f} GB")
    with reading(watcher, "Reading", source):
        return calibration_rows(
            tokenizer,
            RANDOM if source == SELF else source,
            samples=count,
            length=options.length,
            seed=options.seed,
            vocab_size=checkpoint.config.vocab_size,
            max_positions=getattr(checkpoint.config, "max_position_embeddings", None),
            option=option,
            taken=taken,
        )
