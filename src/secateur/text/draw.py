"""The rows of a run: which come from where, and what each of them is for."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.memory import available_bytes
from secateur.base.progress import busy_reading
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.text.calibration import calibration_rows
from secateur.text.self_calibration import self_rows
from secateur.text.sources import RANDOM, SELF

HELD_OUT = 16
"""Rows on which a loss is measured, where a target asks for it."""
UNSEEN_SHARE = 32
"""One row in so many is left out of the refit, for the scale of the final norm."""


@dataclass(frozen=True)
class RowRequest:
    """What rows a run needs."""

    source: str
    """The text by which widths and units are chosen; see `secateur.text.documents`."""
    samples: int
    length: int
    seed: int
    refit_source: str
    """The text that weights are fitted to."""
    refit_samples: int | None
    """Rows of their own for the fit; None where these are the ones by which units are chosen."""
    refit_option: str = "refit-samples"
    """What a person calls that number, for advice."""
    held_out: int = 0
    """Other rows of the first text, on which a loss is measured."""
    random: bool = False
    """Random ids are drawn too, on which units are chosen."""
    copies: int = 0
    """Fits, each of which takes the rows and a copy of them that the dense model has partly rewritten."""
    fits: bool = True
    """Weights are fitted; otherwise means and scores are those of the text as it is."""
    tempers: bool = True
    """Some rows are left out of the fit, for the scale of the final norm."""


@dataclass(frozen=True)
class CalibrationRows:
    """Token rows of a run (each rows x length)."""

    request: RowRequest
    text: Tensor
    """The rows by which widths and units are chosen."""
    refit_text: Tensor
    """The rows that weights are fitted to, unseen ones behind; the same ones where there are no others."""
    held_out: Tensor | None
    """Other rows of the first text, on which a loss is measured."""
    random: Tensor | None
    """Random ids on which units are chosen in place of `text`."""
    begins_with_bos: bool
    copies: Tensor | None = None
    """The fitted rows once more for each fit, half of their tokens rewritten (fits x rows x length)."""

    @property
    def fitted(self) -> Tensor:
        """The rows that weights are fitted to."""
        return self.refit_text[: len(self.refit_text) - len(self.unseen)]

    @property
    def unseen(self) -> Tensor:
        """Rows that the fit only runs along, for the scale of the final norm; none where nothing is fitted, or few."""
        count = len(self.refit_text) // UNSEEN_SHARE if self.request.tempers else 0
        return self.refit_text[len(self.refit_text) - count :]

    @cached_property
    def groups(self) -> Rows:
        """What the fit runs on: rows to fit, unseen ones, rows by which alone units are chosen, held-out ones."""
        rows = self._opened(self.fitted)
        if self.copies is not None:
            rows = rows.with_versions(*self.copies)
        if len(self.unseen):
            rows = rows.along(self.unseen)
        if self.random is not None:
            rows = rows.scored_by(Rows.of(self.random))
        elif self.refit_text is not self.text:
            rows = rows.scored_by(self._opened(self.text))
        return rows if self.held_out is None else rows.along(self.held_out)

    def _opened(self, rows: Tensor) -> Rows:
        # Openings are there for fits; where nothing is fitted, means and scores are those of the text itself.
        plain = self.begins_with_bos or not self.request.fits
        return Rows.of(rows) if plain else Rows.of(rows).with_openings()

    def with_blank_copies(self) -> "CalibrationRows":
        """These rows with as many copies as a run has; what is in them does not count."""
        copies = self.request.copies
        return replace(self, copies=self.fitted.repeat(copies, 1, 1)) if copies else self


def draw(
    stream: BlockStream,
    tokenizer: Any,
    request: RowRequest,
    *,
    begins_with_bos: bool,
    dry: bool = False,
) -> CalibrationRows:
    """Read, draw or write all rows of a run, their copies aside.

    Where the fit has rows of its own from the same text, all come out of one draw: no token is used twice.

    Args:
        request: what is needed.
        begins_with_bos: whether the tokenizer puts BOS in front of a text.
        dry: only the number of rows matters: random ids stand for what the model would write.

    Raises:
        SecateurError: a source that cannot be read or is too short, or a model that cannot write.
    """
    held, apart = request.held_out, request.refit_samples or 0
    processes, watcher = stream.processes, stream.services.watcher
    _check_room(request)
    together = apart if request.refit_source == request.source else 0

    def rows(source: str, count: int, option: str, taken: int = 0) -> Tensor:
        """Rows of one source; `option` is what a person calls their number, `taken` of them aside."""
        how: dict[str, Any] = {"samples": count, "length": request.length, "seed": request.seed}
        checkpoint, text = stream.checkpoint, RANDOM if source == SELF else source
        if source == SELF and not dry:
            where: dict[str, Any] = {"device": stream.device, "watcher": watcher}

            def written() -> Any:
                return processes.broadcast(lambda: self_rows(checkpoint, tokenizer, **how, **where).tolist())

            return torch.tensor(stream.services.saved_result(f"written-{option}", written))
        if source == SELF:
            watcher.note(f"To write its own text, the model is first loaded whole: {checkpoint.bytes / 1e9:,.2f} GB")
        how |= {"vocab_size": checkpoint.config.vocab_size, "max_positions": checkpoint.max_positions}
        with busy_reading(watcher, "Reading", source):
            return torch.tensor(
                processes.broadcast(
                    lambda: calibration_rows(tokenizer, text, **how, option=option, taken=taken).tolist()
                )
            )

    choose = request.samples + held
    if together:
        first = rows(request.source, choose + together, "refit-samples", choose)
    else:
        first = rows(request.source, choose, "samples", held)
    text, held_out, own = first.split([request.samples, held, together])
    if apart and not together:
        own = rows(request.refit_source, apart, request.refit_option)
    ids = rows(RANDOM, request.samples, "samples") if request.random else None
    return CalibrationRows(request, text, own if apart else text, held_out if held else None, ids, begins_with_bos)


def _check_room(request: RowRequest) -> None:
    """Sources without end give as many rows as they are asked for, and their ids alone may be too many."""
    rows = request.samples + request.held_out + (request.refit_samples or 0)
    needed, free = 8 * rows * request.length, available_bytes()
    if needed > free:
        raise SecateurError(
            f"samples is {request.samples:,}: the ids of such rows take {needed / 1e9:,.0f} GB, and "
            f"{free / 1e9:,.0f} GB are free; take fewer"
        )
