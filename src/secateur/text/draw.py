"""Calibration rows of a run: which source each row comes from, and which step uses it."""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.memory import available_bytes
from secateur.base.progress import busy_reading
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.text.calibration import SAMPLES, SampleOption, calibration_rows
from secateur.text.self_calibration import self_rows
from secateur.text.sources import RANDOM, SELF

HELD_OUT = 16
"""Number of held-out rows on which a loss is measured, if the target is a perplexity."""
NORM_SCALE_SHARE = 32
"""Number of refit rows of which one is held out to fit the final-norm scale."""


@dataclass(frozen=True)
class RowRequest:
    """Numbers and sources of the rows that a run needs."""

    source: str
    """Source of the rows by which widths and units are chosen; see `secateur.text.documents`."""
    samples: int
    length: int
    """Tokens in a row."""
    seed: int
    refit_source: str
    """Source of the rows to which weights are fitted."""
    refit_samples: int | None
    """Number of rows that only the refit uses; None if it uses the rows by which units are chosen."""
    refit_option: str = "refit-samples"
    """Name of the option that sets the number of refit rows, for error messages."""
    held_out: int = 0
    """Number of held-out rows from `source`, on which a loss is measured."""
    random_ids: bool = False
    """Whether rows of random ids are drawn as well, on which units are chosen."""
    resamplings: int = 0
    """Number of sets of resampled rows, one for each fit; the weights of all fits are averaged."""
    fits_weights: bool = True
    """Whether weights are fitted; otherwise means and scores are computed on the text as it is."""
    fits_norm_scale: bool = True
    """Whether some refit rows are held out to fit the final-norm scale."""


@dataclass(frozen=True)
class CalibrationRows:
    """Token ids of all rows of a run (each rows x length)."""

    request: RowRequest
    selection: Tensor
    """Rows by which widths and units are chosen."""
    separate_refit: Tensor | None
    """Rows that only the refit uses; None if it uses the selection rows."""
    held_out: Tensor | None
    """Held-out rows on which a loss is measured."""
    random: Tensor | None
    """Rows of random ids, on which units are chosen in place of the selection rows."""
    begins_with_bos: bool
    resampled: Tensor | None = None
    """Resampled versions of the fit rows, one set for each fit (fits x rows x length)."""

    @property
    def tokens(self) -> int:
        """Number of tokens of the text by which units are chosen and to which weights are fitted."""
        return self.selection.numel() + (0 if self.separate_refit is None else self.separate_refit.numel())

    @property
    def fit(self) -> Tensor:
        """Rows to which weights are fitted."""
        return self._refit[: len(self._refit) - self._norm_scale_count]

    @property
    def norm_scale(self) -> Tensor:
        """Held-out rows for the final-norm scale; none where the run does not fit it, or has few rows."""
        return self._refit[len(self._refit) - self._norm_scale_count :]

    @property
    def _refit(self) -> Tensor:
        return self.selection if self.separate_refit is None else self.separate_refit

    @property
    def _norm_scale_count(self) -> int:
        return len(self._refit) // NORM_SCALE_SHARE if self.request.fits_norm_scale else 0

    @cached_property
    def grouped(self) -> Rows:
        """All rows of the fit as groups with weights.

        The order is: fit rows, resampled rows, rows for the final-norm scale, rows that only choose units, held-out
        rows.
        """
        rows = self._with_openings(self.fit)
        if self.resampled is not None:
            rows = rows.with_resampled(*self.resampled)
        if len(self.norm_scale):
            rows = rows.with_held_out(self.norm_scale)
        if self.random is not None:
            rows = rows.with_choice_rows(Rows.of(self.random))
        elif self.separate_refit is not None:
            rows = rows.with_choice_rows(self._with_openings(self.selection))
        return rows if self.held_out is None else rows.with_held_out(self.held_out)

    def _with_openings(self, rows: Tensor) -> Rows:
        # Rows of one token are used in fits only; means and scores are computed on the text as it is.
        plain = self.begins_with_bos or not self.request.fits_weights
        return Rows.of(rows) if plain else Rows.of(rows).with_openings()

    def with_placeholders(self) -> "CalibrationRows":
        """Return these rows with as many resampled rows as the run will have; their tokens are arbitrary."""
        count = self.request.resamplings
        return replace(self, resampled=self.fit.repeat(count, 1, 1)) if count else self


def draw(
    stream: BlockStream,
    tokenizer: Any,
    request: RowRequest,
    *,
    begins_with_bos: bool,
    dry: bool = False,
) -> CalibrationRows:
    """Read, draw or generate all rows of a run except the resampled ones.

    Rows from the same source are drawn together, so that no token is used twice.

    Args:
        stream: The dense model.
        tokenizer: Its tokenizer.
        request: Numbers and sources of the rows.
        begins_with_bos: Whether the tokenizer puts BOS in front of a text.
        dry: Whether only the number of rows matters; then random ids take the place of rows that the model generates.

    Raises:
        SecateurError: A source cannot be read or is too short, or the model cannot generate text.
    """
    _check_memory(request)
    rows = partial(_rows, stream, tokenizer, request, dry=dry)
    refit = request.refit_samples or 0
    chosen, shared = request.samples + request.held_out, refit if request.refit_source == request.source else 0
    option = SampleOption("refit-samples", chosen) if shared else SampleOption("samples", request.held_out)
    drawn = rows(request.source, chosen + shared, option)
    selection, held_out, separate = drawn.split([request.samples, request.held_out, shared])
    if refit > shared:
        separate = rows(request.refit_source, refit, SampleOption(request.refit_option))
    random = rows(RANDOM, request.samples, SAMPLES) if request.random_ids else None
    return CalibrationRows(
        request,
        selection,
        separate_refit=separate if refit else None,
        held_out=held_out if request.held_out else None,
        random=random,
        begins_with_bos=begins_with_bos,
    )


def _rows(
    stream: BlockStream,
    tokenizer: Any,
    request: RowRequest,
    source: str,
    count: int,
    option: SampleOption,
    *,
    dry: bool,
) -> Tensor:
    """Return rows of one source, which one process reads, draws or lets the model generate for all processes."""
    services, checkpoint = stream.services, stream.checkpoint
    size: dict[str, Any] = {"samples": count, "length": request.length, "seed": request.seed}

    def generate() -> list[Any]:
        rows = self_rows(checkpoint, tokenizer, **size, device=stream.device, watcher=services.watcher)
        return list(rows.tolist())

    def read() -> list[Any]:
        limits = {"vocab_size": checkpoint.config.vocab_size, "max_positions": checkpoint.max_positions}
        readable = RANDOM if source == SELF else source
        return list(calibration_rows(tokenizer, readable, **size, **limits, option=option).tolist())

    if source == SELF and not dry:
        name = f"written-{option.name}"
        return torch.tensor(services.saved_result(name, lambda: stream.processes.broadcast(generate)))
    if source == SELF:
        held = f"{checkpoint.bytes / 1e9:,.2f} GB"
        services.watcher.note(f"The whole model ({held}) is loaded first, because it generates the calibration text")
    with busy_reading(services.watcher, "Reading", source):
        return torch.tensor(stream.processes.broadcast(read))


def _check_memory(request: RowRequest) -> None:
    """Raise `SecateurError` if the ids of all rows alone take more than the free memory."""
    rows = request.samples + request.held_out + (request.refit_samples or 0)
    needed, free = 8 * rows * request.length, available_bytes()
    if needed > free:
        raise SecateurError(
            f"samples is {request.samples:,}: the token ids of all rows take {needed / 1e9:,.0f} GB, and "
            f"{free / 1e9:,.0f} GB are free; use fewer"
        )
