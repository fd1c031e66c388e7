"""What a dry run expects of each step: seconds, and bytes above what Python and its libraries take."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from secateur.base.device import fast_dtype
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
from secateur.commands.options import SELF, Options
from secateur.model.activations import Rows
from secateur.model.stream import BlockStream
from secateur.plan.decide import Request, survey_rows
from secateur.plan.meters import cache_meter, parameter_meter
from secateur.survey.survey import PROBED
from secateur.text.draw import Drawn
from secateur.text.self_calibration import rows_at_once, writing_bytes

WRITING = 4096
"""Width of the matrix by which speed is measured: larger than the caches, as a model is."""
SLACK = 1.5
"""Seconds over those that the products alone take."""


Speed = Callable[[torch.dtype], float]
"""Operations per second of this device's products in a dtype."""


def speed(stream: BlockStream) -> Speed:
    """The speed in each dtype, measured when it is first asked for."""
    return cache(lambda dtype: product_rate(stream.device, dtype=dtype))


def surveying(asked: Request, text: Tensor, rate: Speed) -> tuple[float, int]:
    """Seconds and bytes of the survey, each module probed at so many widths and without units."""
    stream, (few, probed) = asked.stream, survey_rows(text)
    # An upper bound where only some blocks are chosen: fewer streams begin then.
    how = {"probed": probed.numel(), "probes": len(asked.kinds) * (len(PROBED) + 1)}
    seconds = SLACK * survey_flops(stream.blocks, few.numel(), **how) / rate(torch.float32)
    return seconds, survey_bytes(stream.blocks, stream.width, few.numel(), **how)


def fits(stream: BlockStream, rows: Rows, rate: Speed) -> tuple[float, int]:
    """Seconds and bytes of all fits without level 1."""
    tokens = [part.tokens for part in rows.fits()]
    streams = sum(stream_flops(stream.blocks, each) for each in tokens)
    solves = sum(solve_flops(stream.blocks, stream.width, each) for each in tokens)
    seconds = SLACK * (streams / rate(stream.quick_dtype) + solves / rate(torch.float32))
    return seconds, _bytes(stream, rows)


def writing(stream: BlockStream, options: Options, drawn: Drawn, more: Tensor | None) -> tuple[float, int]:
    """Seconds and bytes that the model takes to write its own text; nothing where all rows come from another.

    A token takes two operations a parameter, at the speed that this machine has with as few rows as are written at
    once: there, reading the weights sets it.
    """
    parts = (drawn.text, drawn.text.new_empty(0) if drawn.fitted is None else drawn.fitted)
    tokens = sum(rows.numel() for source, rows in zip(options.sources, parts, strict=True) if source == SELF)
    if options.more == SELF and more is not None:
        tokens += more.numel()
    if not tokens:
        return 0.0, 0
    checkpoint, cached = stream.checkpoint, cache_meter(stream, stream.checkpoint.dtype).dense
    batch = min(rows_at_once(options.length), tokens // options.length)
    rate = product_rate(stream.device, WRITING, rows=batch, dtype=checkpoint.dtype)
    seconds = SLACK * 2 * parameter_meter(stream).dense * tokens / rate
    return seconds, round(writing_bytes(checkpoint, length=options.length, cache_bytes=cached))


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
    """Of all fits without level 1, of which the first is the largest."""
    first, *others = (*rows.fits(), rows.beside())
    apart, resting = rows.scores is not None, sum(part.tokens for part in others)
    return memory_bytes(stream.blocks, stream.width, first.tokens, others=resting, apart=apart)
