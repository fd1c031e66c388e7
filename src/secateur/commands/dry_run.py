"""A dry run: what would come out, and the seconds and bytes that each step takes."""

from collections.abc import Callable
from functools import cache

import torch

from secateur.base.device import fast_dtype
from secateur.base.errors import SecateurError
from secateur.commands.costs import (
    gradient_bytes,
    gradient_flops,
    level1_bytes,
    level1_flops,
    memory_bytes,
    product_rate,
    solve_flops,
    stream_flops,
    survey_bytes,
    survey_flops,
)
from secateur.commands.open import OpenRun
from secateur.commands.result import summary_of
from secateur.commands.steps import draw_rows
from secateur.commands.survey_file import survey_rows
from secateur.criteria.registry import Criteria
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.plan.meters import cache_meter, parameter_meter
from secateur.plan.plan import plan
from secateur.report.summary import Summary
from secateur.survey.survey import PROBED
from secateur.text.draw import CalibrationRows
from secateur.text.self_calibration import rows_at_once, writing_bytes
from secateur.text.sources import SELF

WRITING = 4096
"""Width of the matrix by which the speed of writing is measured: larger than the caches, as a model is."""
SLACK = 1.5
"""Seconds over those that the products alone take."""

Speed = Callable[[torch.dtype], float]
"""Operations per second of this device's products in a dtype."""


def expect(run: OpenRun) -> Summary:
    """Count what would come out, and what it would take.

    Raises:
        SecateurError: the sizes are known only once the model has run.
    """
    options, survey = run.options, run.running.survey
    if options.searches:
        raise SecateurError("the size for a target of perplexity is found by pruning; leave out --dry-run")
    if options.choice.alone:
        raise SecateurError("how many heads are similar is found by running the model; leave out --dry-run")
    rows = draw_rows(run, dry=True).with_blank_copies()
    if run.request.needs_survey:
        run.watcher.note("Shown is a plan by size alone; a run measures where cuts cost least")
    decided = run.request.plan_from_file or plan(run.request.problem, options.widths)
    with run.watcher.busy("Measuring this machine"):
        rate = speed(run.stream)
        parts = [fits(run.stream, rows.groups, rate), writing(run, rows)]
        if run.recovery.fits_level1:
            parts.append(fitting_level1(run.stream, rows.groups, options.level1, rate))
    if run.request.needs_survey and not (survey and survey.exists()):
        parts.append(surveying(run, rows, rate))
    if Criteria(options.scores).need_gradients and not decided.exact:
        parts.append(backward(run.stream, rows.groups, rate))
    seconds, peaks = zip(*parts, strict=True)
    return summary_of(run, rows, decided, (sum(seconds), max(peaks)))


def speed(stream: BlockStream) -> Speed:
    """The speed in each dtype, measured when it is first asked for."""
    return cache(lambda dtype: product_rate(stream.device, dtype=dtype))


def surveying(run: OpenRun, rows: CalibrationRows, rate: Speed) -> tuple[float, int]:
    """Seconds and bytes of the survey, each module probed at so many widths and without units."""
    stream, (few, probed) = run.stream, survey_rows(rows.text)
    # An upper bound where only some blocks are chosen: fewer streams begin then.
    how = {"probed": probed.numel(), "probes": len(run.options.kinds) * (len(PROBED) + 1)}
    seconds = SLACK * survey_flops(stream.blocks, few.numel(), **how) / rate(torch.float32)
    return seconds, survey_bytes(stream.blocks, stream.width, few.numel(), **how)


def fits(stream: BlockStream, rows: Rows, rate: Speed) -> tuple[float, int]:
    """Seconds and bytes of all fits without level 1."""
    tokens = [part.tokens for part in rows.fits()]
    streams = sum(stream_flops(stream.blocks, each) for each in tokens)
    solves = sum(solve_flops(stream.blocks, stream.width, each) for each in tokens)
    seconds = SLACK * (streams / rate(stream.quick_dtype) + solves / rate(torch.float32))
    return seconds, _bytes(stream, rows)


def writing(run: OpenRun, rows: CalibrationRows) -> tuple[float, int]:
    """Seconds and bytes that the model takes to write its own text; nothing where all rows come from another.

    A token takes two operations a parameter, at the speed that this machine has with as few rows as are written at
    once: there, reading the weights sets it.
    """
    stream, length = run.stream, run.options.length
    parts = (rows.text, rows.refit_text if rows.refit_text is not rows.text else rows.text[:0])
    tokens = sum(part.numel() for source, part in zip(run.options.sources, parts, strict=True) if source == SELF)
    if not tokens:
        return 0.0, 0
    checkpoint, cached = stream.checkpoint, cache_meter(stream, stream.checkpoint.dtype).dense
    batch = min(rows_at_once(length), tokens // length)
    rate = product_rate(stream.device, WRITING, rows=batch, dtype=checkpoint.dtype)
    seconds = SLACK * 2 * parameter_meter(stream).dense * tokens / rate
    return seconds, round(writing_bytes(checkpoint, length=length, cache_bytes=cached))


def backward(stream: BlockStream, rows: Rows, rate: Speed) -> tuple[float, int]:
    """Seconds and bytes of the gradients."""
    seconds = SLACK * gradient_flops(stream.blocks, rows.tokens) / rate(torch.float32)
    return seconds, gradient_bytes(stream.blocks, stream.width, rows.tokens)


def fitting_level1(stream: BlockStream, rows: Rows, steps: int, rate: Speed) -> tuple[float, int]:
    """Seconds and bytes of fitting level 1 of the feed-forward along, the run without it included in the bytes."""
    width, dtype, tokens = stream.width, fast_dtype(stream.device), [part.tokens for part in rows.fits()]
    parts = [level1_flops(block, width, each, steps) for each in tokens for block in stream.blocks]
    exact, quick = (sum(part) for part in zip(*parts, strict=True))
    seconds = SLACK * (exact / rate(torch.float32) + quick / rate(dtype))
    return seconds, level1_bytes(stream.blocks, width, tokens[0], dtype.itemsize) + _bytes(stream, rows)


def _bytes(stream: BlockStream, rows: Rows) -> int:
    """Bytes of all fits without level 1, of which the first is the largest."""
    first, *others = (*rows.fits(), rows.counted(False))
    apart, resting = rows.scores is not None, sum(part.tokens for part in others)
    return memory_bytes(stream.blocks, stream.width, first.tokens, others=resting, apart=apart)
