"""A dry run: the sizes of the pruned model, and the time and memory that the run is expected to need at each effort.

Each step runs for real on a sample (`sample.py`). Not included are the final-norm scale, the search for similar heads,
and the writing of the output.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.memory import MemoryBudget, rss_bytes
from secateur.base.progress import Silent
from secateur.criteria.registry import Criteria
from secateur.fit.loop import refit
from secateur.fit.recovery import Method
from secateur.model.rows import Rows
from secateur.plan.meters import cache_meter
from secateur.plan.plan import plan as solve
from secateur.plan.problem import Plan
from secateur.report.summary import Summary
from secateur.steps.draw_rows import draw_rows
from secateur.steps.memory import resident_bytes
from secateur.steps.open_model import OpenRun
from secateur.steps.options import EFFORTS, Options
from secateur.steps.result import summarize
from secateur.steps.sample import Clock, Sample, Step, Usage, Visits, line
from secateur.steps.survey_file import split_survey_rows
from secateur.steps.survey_model import survey_rows
from secateur.survey.gradients import gradient_scores
from secateur.text.draw import CalibrationRows
from secateur.text.resample import resample_tokens
from secateur.text.self_calibration import generation_bytes, rows_at_once, self_rows
from secateur.text.sources import SELF

GENERATED = 8, 24
"""Lengths of generated rows whose times give the time of one token."""
GRADIENT_BYTES = 4 * 7
"""Bytes for each parameter of a block during a backward pass: its weights in float32, and its gradients, their sums and
the sums of their squares, some of them in float64."""


def estimate(run: OpenRun) -> Summary:
    """Return the sizes of the pruned model, and the expected time and memory of the run.

    Raises:
        SecateurError: Only a real run can find out how much is removed.
    """
    options = run.options
    if options.targets_perplexity:
        raise SecateurError(
            "only a real run can reach a target of perplexity, because it prunes to several sizes; leave out --dry-run"
        )
    if options.parsed_criterion.only_compares_heads:
        raise SecateurError(
            "only a real run can find the number of similar heads, because it runs the model; leave out --dry-run"
        )
    rows = draw_rows(run, dry=True)
    if run.request.needs_survey:
        run.watcher.note(
            "This plan assumes that all blocks are equally important; a real run measures the cost of each width first"
        )
    plan = run.request.plan_from_file or solve(run.request.problem, options.widths)
    opened, limit = time.perf_counter() - run.started, run.memory_bytes - rss_bytes()
    efforts = tuple(EFFORTS) if run.recovery.uses_effort else (options.effort,)
    resident = _resident_bytes(run, rows, plan)
    expected = {
        effort: (opened + usage.seconds, min(round(resident + usage.bytes), limit))
        for effort, usage in usage_by_effort(run, rows, plan, efforts).items()
    }
    return summarize(run, rows, plan, expected)


def usage_by_effort(
    run: OpenRun, rows: CalibrationRows, plan: Plan, efforts: Sequence[str], clock: Clock = time.perf_counter
) -> dict[str, Usage]:
    """Return the usage of the whole run at each effort.

    Args:
        run: The result of `open_model`.
        rows: The calibration rows, without the resampled ones.
        plan: The widths of the blocks to prune.
        efforts: Names of the efforts.
        clock: Measures the time.
    """
    runs = {effort: replace(run, options=replace(run.options, effort=effort)) for effort in efforts}
    file, criteria = run.run_options.survey, _any_criteria(run)
    surveys = run.request.needs_survey and not run.processes.broadcast(lambda: file is not None and file.exists())
    steps: dict[str, Step] = {"resample": partial(_resample, rows)}
    if surveys:
        steps["survey"] = partial(_survey, rows, criteria)
    steps |= {effort: partial(_fit, rows, plan, criteria, one.options) for effort, one in runs.items()}
    sample = Sample(run, plan, len(rows.selection), clock)
    before = [_generation(run, rows, clock)]
    if _needs_gradients(run, plan):
        # A survey has a backward pass of its own.
        before += [_gradients(run, rows.selection, sample.shares[-1], clock)] * (1 + surveys)
    trials = sample.try_out(steps)
    if surveys:
        probe_rows = len(split_survey_rows(rows.selection)[1])
        before.append(sample.usage(trials["survey"], trials["resample"], probe_rows))
    resampling = sample.usage(trials["resample"])
    return {
        effort: Usage.total([*before, *[resampling] * (one.row_request.resamplings > 0), sample.usage(trials[effort])])
        for effort, one in runs.items()
    }


def _any_criteria(run: OpenRun) -> Criteria:
    """Return the criteria of the run, with arbitrary scores in place of those that a backward pass would give."""
    scores = {
        (index, module.kind): torch.rand(module.units, dtype=torch.float64)
        for index, block in enumerate(run.stream.blocks)
        for module in block.modules_left
    }
    return Criteria(run.options.criterion_name, scores)


def _part(rows: Tensor, share: float) -> Tensor:
    """Return the first rows."""
    return rows[: max(1, round(share * len(rows)))]


def _resample(rows: CalibrationRows, run: OpenRun, share: float, visits: Visits) -> None:
    """Resample some rows."""
    resample_tokens(run.stream, _part(rows.fit, share), checkpoint=visits)


def _survey(rows: CalibrationRows, criteria: Criteria, run: OpenRun, share: float, visits: Visits) -> None:
    """Survey blocks, with error curves from some rows, and probes on as many rows as in the run."""
    curve_rows, probe_rows = split_survey_rows(rows.selection)
    fitted = Rows.of(_part(curve_rows, share))
    if rows.random is not None:
        fitted = fitted.with_choice_rows(Rows.of(_part(rows.random, share)))
    survey_rows(run, fitted, probe_rows, criteria, visits)


def _fit(
    rows: CalibrationRows, plan: Plan, criteria: Criteria, options: Options, run: OpenRun, share: float, visits: Visits
) -> None:
    """Fit blocks to some rows."""
    run = replace(run, options=options)
    parts: dict[str, Any] = {
        name: _part(ids, share)
        for name in ("selection", "separate_refit", "random")
        if (ids := getattr(rows, name)) is not None
    }
    grouped = replace(rows, request=run.row_request, **parts).with_placeholders().grouped
    method = Method(criteria, run.recovery, options.seed)
    for _ in refit(run.stream, plan, grouped, method=method, dtype=run.dtype, checkpoint=visits):
        pass


def _generation(run: OpenRun, rows: CalibrationRows, clock: Clock) -> Usage:
    """Return the usage of the generation of calibration rows, of which one process measures a few short ones."""
    checkpoint, options = run.stream.checkpoint, run.options
    parts = (rows.selection, rows.selection[:0] if rows.separate_refit is None else rows.separate_refit)
    count = sum(len(part) for source, part in zip(options.sources, parts, strict=True) if source == SELF)
    if not (count and run.processes.is_first):
        return Usage(0.0, 0.0)
    at_once, seconds = rows_at_once(options.length), list[tuple[float, float]]()
    lengths = GENERATED if options.length > max(GENERATED) else (options.length,)
    for length in run.watcher.track(lengths, "Measure generation"):
        start = clock()
        self_rows(
            checkpoint,
            run.tokenizer,
            samples=min(at_once, count),
            length=length,
            seed=options.seed,
            device=run.stream.device,
        )
        seconds.append((length, clock() - start))
    return Usage(line(seconds, ceil(count / at_once) * options.length), 0.0)


def _needs_gradients(run: OpenRun, plan: Plan) -> bool:
    """Return whether the criterion needs a backward pass."""
    return Criteria(run.options.criterion_name).needs_gradients and not plan.lists_units


def _gradients(run: OpenRun, rows: Tensor, share: float, clock: Clock) -> Usage:
    """Return the usage of a backward pass, measured with the first block alone and with the first two blocks."""
    some, usages = _part(rows, share), []
    for depth in (1, 2):
        stream = run.stream.using(budget=MemoryBudget(run.services.budget.limit), watcher=Silent())
        stream.blocks, start = stream.blocks[:depth], clock()
        gradient_scores(stream, some, run.options.criterion_name)
        usages.append((depth, Usage(clock() - start, stream.services.budget.peak)))
    times = len(rows) / len(some)
    return Usage(*(times * line([(depth, used[field]) for depth, used in usages], len(run.stream)) for field in (0, 1)))


def _resident_bytes(run: OpenRun, rows: CalibrationRows, plan: Plan) -> float:
    """Return the bytes that the step that needs most holds in memory, without activations."""
    stream, grouped = run.stream, rows.with_placeholders().grouped
    needed: list[float] = [
        resident_bytes(
            stream,
            tokens=grouped.fits()[0].tokens,
            input_steps=run.recovery.input_steps > 0,
            separate_choice=grouped.choice_weights is not None,
        )
    ]
    if _needs_gradients(run, plan):
        needed.append(GRADIENT_BYTES * max(block.parameters for block in stream.blocks))
    if SELF in run.options.sources:
        cache_bytes = cache_meter(stream, stream.checkpoint.dtype).dense
        needed.append(generation_bytes(stream.checkpoint, length=run.options.length, cache_bytes=cache_bytes))
    return max(needed)
