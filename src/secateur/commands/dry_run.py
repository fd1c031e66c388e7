"""A dry run: what would come out, and the seconds and bytes that it takes at each effort.

Operations and bytes are counted (`commands/costs.py`); how fast this machine carries them out is measured.
"""

import time
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.memory import rss_bytes
from secateur.commands.costs import (
    Work,
    fit_work,
    forward_flops,
    gradient_work,
    resampling_work,
    survey_work,
)
from secateur.commands.draw_rows import draw_rows
from secateur.commands.open_model import OpenRun
from secateur.commands.options import EFFORTS
from secateur.commands.result import summarize
from secateur.commands.survey_file import split_survey_rows
from secateur.criteria.registry import Criteria
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.plan.meters import cache_meter, parameter_meter
from secateur.plan.plan import plan
from secateur.plan.problem import Plan
from secateur.report.summary import Summary
from secateur.survey.curve_estimator import PROBED_SHARES
from secateur.text.draw import CalibrationRows
from secateur.text.self_calibration import generation_bytes, rows_at_once
from secateur.text.sources import SELF

WRITING = 4096
"""Width of the matrix by which the speed of writing is measured: larger than the caches, as a model is."""
NARROW = 0.6
"""Share of a square product's speed that factorisations and updates of a few columns reach."""
SLACK = 1.5
"""Seconds over those that the counted operations take at the measured speeds."""


class Speeds(NamedTuple):
    """Operations per second, for the fields of `Work`."""

    forward: float
    quick: float
    exact: float
    written: float
    moved: float = float("inf")
    """Bytes a second."""

    def seconds(self, work: Work) -> float:
        """How long the counted operations take."""
        return sum(count / speed for count, speed in zip(work, self, strict=False))


def estimate(run: OpenRun) -> Summary:
    """Count what would come out, and what it would take.

    Raises:
        SecateurError: the sizes are known only once the model has run.
    """
    options = run.options
    if options.targets_perplexity:
        raise SecateurError("the size for a target of perplexity is found by pruning; leave out --dry-run")
    if options.parsed_criterion.preselection_only:
        raise SecateurError("how many heads go is found by running the model; leave out --dry-run")
    rows = draw_rows(run, dry=True)
    if run.request.needs_survey:
        run.watcher.note("Shown is a plan by size alone; a run measures where cuts cost least")
    decided = run.request.plan_from_file or plan(run.request.problem, options.widths)
    with run.watcher.busy("Measuring this machine"):
        measured = measure_speeds(run, rows.selection)
    works = work_by_effort(run, rows, decided)
    most = run.memory_bytes - rss_bytes()
    expected = {
        name: (SLACK * measured.seconds(work), min(work.resident + work.streams, most)) for name, work in works.items()
    }
    return summarize(run, rows, decided, expected)


def work_by_effort(run: OpenRun, rows: CalibrationRows, decided: Plan) -> dict[str, Work]:
    """What the whole run takes at each effort; where nothing is fitted by effort, at the one given."""
    before = [_writing(run, rows), *_before_fits(run, rows, decided.lists_units)]
    efforts = EFFORTS if run.recovery.uses_effort else (run.options.effort,)
    return {name: Work.of([*before, *_fitting(run, rows, decided, name)]) for name in efforts}


def _writing(run: OpenRun, rows: CalibrationRows) -> Work:
    """What the model writes itself: two operations a parameter and token."""
    checkpoint, length = run.stream.checkpoint, run.options.length
    parts = (rows.selection, rows.selection[:0] if rows.separate_refit is None else rows.separate_refit)
    tokens = sum(part.numel() for source, part in zip(run.options.sources, parts, strict=True) if source == SELF)
    if not tokens:
        return Work()
    cached = cache_meter(run.stream, checkpoint.dtype).dense
    peak = round(generation_bytes(checkpoint, length=length, cache_bytes=cached))
    return Work(written=2 * parameter_meter(run.stream).dense * tokens, resident=peak)


def _before_fits(run: OpenRun, rows: CalibrationRows, exact: bool) -> list[Work]:
    """Survey and gradients, where there are such."""
    found, file = [], run.run_options.survey
    if run.request.needs_survey and not (file and file.exists()):
        few, probed = split_survey_rows(rows.selection)
        modules = max(len(run.request.problem.prunable_modules(index)) for index in run.request.block_range)
        probes = modules * (len(PROBED_SHARES) + 1)
        found.append(survey_work(run.stream, few.numel(), probed.numel(), probes))
    if Criteria(run.options.criterion_name).needs_gradients and not exact:
        found.append(gradient_work(run.stream, rows.grouped.tokens))
    return found


def _fitting(run: OpenRun, rows: CalibrationRows, decided: Plan, effort: str) -> list[Work]:
    """What an effort decides: rows that are rewritten, and the fits."""
    run = replace(run, options=replace(run.options, effort=effort))
    rows = replace(rows, request=run.row_request).with_placeholders()
    fits = fit_work(run.stream, rows.grouped, decided.widths, run.recovery.input_steps)
    return [fits] if rows.resampled is None else [resampling_work(run.stream, rows.fit.numel()), fits]


def measure_speeds(run: OpenRun, text: Tensor) -> Speeds:
    """This machine's, measured with the model's own first block and with plain products."""
    stream, length = run.stream, text.shape[1]
    checkpoint, batch = stream.checkpoint, min(rows_at_once(length), len(text))
    with stream.quick(), stream.rounded():
        quick = product_rate(stream.device)
    return Speeds(
        forward=forward_rate(stream, text),
        quick=quick,
        exact=NARROW * product_rate(stream.device),
        # As many rows as are written at once: reading the weights sets the speed.
        written=product_rate(stream.device, WRITING, rows=batch, dtype=checkpoint.dtype)
        if SELF in run.options.sources
        else float("inf"),
        moved=copy_rate(stream),
    )


def copy_rate(stream: BlockStream, rows: int = 8192, repeats: int = 3) -> float:
    """Bytes per second, read and written, of putting rows of the residual width into another order."""
    source = torch.ones(rows, stream.width, device=stream.device)
    order = torch.randperm(rows, device=stream.device)
    best = 0.0
    for _ in range(repeats + 1):
        start = time.perf_counter()
        source[order][0, 0].item()
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    return best


def forward_rate(stream: BlockStream, text: Tensor, repeats: int = 3) -> float:
    """Operations per second of the first block on a batch of the text; the best of a few."""
    rows = Rows((text[: max(1, stream.batch_tokens // text.shape[1])],), (1.0,), batch_tokens=stream.batch_tokens)
    best = 0.0
    with stream.arena() as arena, stream.quick():
        hidden = stream.embed(rows, arena)
        with stream.filled(0) as layer:
            for _ in range(repeats + 1):
                start = time.perf_counter()
                for at in rows.batches():
                    stream.run_through(0, layer, hidden[at], at.group)
                best = max(best, forward_flops(stream.blocks[0], rows.tokens) / (time.perf_counter() - start))
    return best


def product_rate(
    device: torch.device | str = "cpu",
    size: int = 1536,
    repeats: int = 5,
    *,
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Floating-point operations per second of a matrix product here, the best of a few.

    The right factor is square; the left one has `rows`, by default as many as that.
    """
    square = torch.randn(size, size, device=device).to(dtype)
    left = square[: rows or size]
    best = 0.0
    for _ in range(repeats + 1):
        start = time.perf_counter()
        (left @ square)[0, 0].item()
        best = max(best, 2 * len(left) * size**2 / (time.perf_counter() - start))
    return best
