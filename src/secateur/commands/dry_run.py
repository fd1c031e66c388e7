"""A dry run: what would come out, and the seconds and bytes that each step takes.

Counted are floating-point operations and bytes in memory; the speed of this machine's products is measured. n
calibration tokens, p parameters of a block's matrices, d residual width, a inputs of a level-2 layer.
"""

import time
from collections.abc import Callable, Iterable
from functools import cache

import torch

from secateur.base.device import fast_dtype
from secateur.base.errors import SecateurError
from secateur.commands.open import OpenRun
from secateur.commands.result import summary_of
from secateur.commands.steps import draw_rows
from secateur.commands.survey_file import survey_rows
from secateur.criteria.registry import Criteria
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.model.structure import Block
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


def forward_flops(block: Block, tokens: int) -> float:
    """One forward of a block: 2 n p. The products inside the attention are left out, as they depend on length."""
    return 2.0 * tokens * block.parameters


def module_flops(inputs: int, width: int, tokens: int) -> float:
    """Gram n a^2, cross moment 2 n a d, factor a^3/3, inverse 2 a^3/3 and solve 2 a^2 d of one module."""
    return tokens * (inputs**2 + 2 * inputs * width) + inputs**3 + 2 * inputs**2 * width


def level1_flops(block: Block, width: int, tokens: int, steps: int) -> tuple[float, float]:
    """Level 1 of the feed-forward fitted along: operations in float32, and those that need not be.

    With m level-1 matrices J and its transpose take m + 1 products of 2 n a d each, one of the two for the right-hand
    side. In float32 are what the module gives now, and its new inputs with their Gram matrix.
    """
    module = block.feed_forward
    product, matrices = 2.0 * tokens * module.units * width, len(module.scored)
    exact = (2 * matrices + 1) * product + module_flops(module.units, width, tokens)
    return exact, (matrices + 1) * product * (2 * steps + 1)


def level1_bytes(blocks: Iterable[Block], width: int, tokens: int, itemsize: int) -> int:
    """What it stores on top of `memory_bytes`: the module's input and a factor for each level-1 matrix."""
    return max(tokens * (width + len(b.feed_forward.scored) * b.feed_forward.units) * itemsize for b in blocks)


def stream_flops(blocks: Iterable[Block], tokens: int) -> float:
    """The dense and the pruned stream: two forwards of the blocks."""
    return sum(2 * forward_flops(block, tokens) for block in blocks)


def solve_flops(blocks: Iterable[Block], width: int, tokens: int) -> float:
    """Each module's statistics and solve once."""
    return sum(module_flops(inputs, width, tokens) for inputs in _level2_inputs(blocks))


def survey_flops(blocks: list[Block], tokens: int, *, probed: int, probes: int) -> float:
    """One forward, each module's Gram matrix and inverse, and from each block on `probes` streams of `probed` tokens.

    A stream begins behind one of the block's two modules. The output layer and refits of what is probed are left out.
    """
    streams = sum(probes * (number + 0.5) * forward_flops(block, probed) for number, block in enumerate(blocks))
    grams = sum(tokens * inputs**2 + inputs**3 for inputs in _level2_inputs(blocks))
    return sum(forward_flops(block, tokens + probed) for block in blocks) + grams + streams


def survey_bytes(blocks: list[Block], width: int, tokens: int, *, probed: int, probes: int) -> int:
    """Its peak, on the scale of `memory_bytes`: nothing of a block is stored, but all probes' streams are."""
    streams = 4 * width * (tokens + probed * (1 + probes * len(blocks)))
    return memory_bytes(blocks, width, 0) + streams


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


def memory_bytes(blocks: list[Block], width: int, tokens: int, *, others: int = 0, apart: bool = False) -> int:
    """Peak expected above what Python and its libraries take: a block twice, its largest solve, and the streams.

    Of `others`, the tokens of all fits but the one under way, both streams are there and nothing else.

    Where the rows that choose units stand `apart` from those that are fitted to, each has a Gram matrix and a cross
    moment. That takes no more operations: a token counts in one of the two.
    """
    block = max(blocks, key=lambda b: b.parameters)
    inputs = max(_level2_inputs([block]))
    solve = (4 + apart) * (inputs * inputs + inputs * width)
    streams = tokens * (6 * width + inputs) + others * 2 * width
    return 4 * (2 * block.parameters + solve + streams)


def gradient_flops(blocks: Iterable[Block], tokens: int) -> float:
    """The backward pass ahead of some criteria: two forwards of the blocks, and twice one for the gradients."""
    return sum(4 * forward_flops(block, tokens) for block in blocks)


def gradient_bytes(blocks: list[Block], width: int, tokens: int) -> int:
    """Its peak, on the scale of `memory_bytes`: a block, its gradients and their squares, and every block's input."""
    block = max(blocks, key=lambda b: b.parameters)
    return 4 * (3 * block.parameters + tokens * width * (len(blocks) + 1))


def _level2_inputs(blocks: Iterable[Block]) -> list[int]:
    """How many inputs each module's level-2 layer has."""
    return [module.units * module.size for block in blocks for module in (block.attention, block.feed_forward)]
