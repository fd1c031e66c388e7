"""A dry run: the sizes of the pruned model, and the time and memory that the run is expected to need at each effort.

Each step runs for real on a sample: one block of each shape, and a small share of the rows. The usage of a whole step
follows from two shares. Each block is assumed to take as long as the measured block of its shape. Between the shares
and beyond them, time and memory are linear. Not included are the final-norm scale, the search for similar heads, and
the writing of the output.

In a survey, the streams of all probes run on to the last block. A sample has few probes, so the others are added with
the time of a forward pass.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.memory import MemoryBudget, rss_bytes
from secateur.base.progress import Silent
from secateur.base.services import Services
from secateur.criteria.registry import Criteria
from secateur.fit.loop import refit
from secateur.fit.recovery import Method
from secateur.model.arena import Activations
from secateur.model.pass_checkpoint import PassCheckpoint
from secateur.model.rows import Rows
from secateur.model.structure import Block
from secateur.plan.meters import cache_meter
from secateur.plan.plan import plan as solve
from secateur.plan.problem import Plan
from secateur.report.summary import Summary
from secateur.steps.draw_rows import draw_rows
from secateur.steps.memory import resident_bytes
from secateur.steps.open_model import OpenRun
from secateur.steps.options import EFFORTS, Options
from secateur.steps.result import summarize
from secateur.steps.survey_model import split_survey_rows, survey_rows
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
SHORT = 0.5
"""Seconds below which a block is visited again, because the first call of any function takes longer."""
MOST_VISITS = 3
"""Largest number of visits to a block, of which the fastest counts."""

Clock = Callable[[], float]
"""Function that returns the time in seconds, or another quantity that grows while a step runs."""


class Usage(NamedTuple):
    """Time and memory of a step."""

    seconds: float
    bytes: float
    """Bytes of activations, and of experts that stay in memory."""

    @classmethod
    def total(cls, steps: Sequence["Usage"]) -> "Usage":
        """Return the usage of steps that run one after the other."""
        return cls(sum(step.seconds for step in steps), max(step.bytes for step in steps))


class Visit(NamedTuple):
    """Run of a step through a block."""

    seconds: float
    probes: int
    """Number of probes whose streams ran through the block too."""
    begun: int
    """Number of probes that began at the block."""


class Visits(PassCheckpoint):
    """Checkpoint of a pass that saves nothing, visits some blocks only, and measures the time of each visit.

    Attributes:
        of: Visits to each block.
        stop: Number of blocks of the whole pass.
        rest: Seconds that the step took outside the blocks.
        peak: Largest number of bytes in the memory budget of the step.
    """

    stop = peak = 0
    rest = 0.0

    def __init__(self, services: Services, indices: Sequence[int], clock: Clock):
        super().__init__(services)
        self.of: dict[int, list[Visit]] = {index: [] for index in indices}
        self._clock = clock

    def blocks(self, stop: int, what: str, streams: Callable[[], Sequence[Activations]]) -> Iterator[int]:
        """Yield each of the blocks up to `MOST_VISITS` times."""
        self.stop, without_probes = stop, len(streams())
        for index, visits in self.of.items():
            while not self._services.processes.broadcast(partial(_is_measured, visits)):
                count, start = len(streams()), self._clock()
                yield index
                visits.append(Visit(self._clock() - start, count - without_probes, len(streams()) - count))


def _is_measured(visits: Sequence[Visit]) -> bool:
    """Return whether a block needs no further visit."""
    return len(visits) >= MOST_VISITS or sum(visit.seconds for visit in visits) >= SHORT


Step = Callable[[OpenRun, float, Visits], object]
"""Function that runs a step on a share of its rows, through the blocks of the visits."""
Trials = Sequence[tuple[float, Visits]]
"""Measurements of a step, each on a share of its rows."""


class Sample:
    """Sample of a run.

    Attributes:
        stands_for: For each block, the index of the block that is measured in its place.
        shares: Shares of the rows: two, or all rows if they are few.
    """

    def __init__(self, run: OpenRun, plan: Plan, rows: int, clock: Clock):
        """Choose blocks and rows.

        Args:
            run: The result of `open_model`.
            plan: The widths of the blocks to prune.
            rows: Number of calibration rows.
            clock: Measures the time.
        """
        self._run, self._rows, self._clock = run, rows, clock
        self.stands_for = _stand_ins(run.stream.blocks, plan)
        many = max(2, run.stream.batch_tokens // run.options.length) * run.processes.size
        # Each expert needs some tokens before it is fitted.
        few = many // 2 if run.stream.family.experts else run.processes.size
        self.shares = (few / rows, many / rows) if many < rows else (1.0,)

    def try_out(self, steps: Mapping[str, Step]) -> dict[str, Trials]:
        """Run each step on each share of its rows."""
        trials: dict[str, list[tuple[float, Visits]]] = {name: [] for name in steps}
        for name, share in self._run.watcher.track([*product(steps, self.shares)], "Measure"):
            budget = MemoryBudget(self._run.services.budget.limit)
            stream = self._run.stream.using(budget=budget, watcher=Silent())
            visits = Visits(stream.services, sorted(set(self.stands_for)), self._clock)
            start = self._clock()
            steps[name](replace(self._run, stream=stream), share, visits)
            spent = sum(visit.seconds for all in visits.of.values() for visit in all)
            visits.rest, visits.peak = self._clock() - start - spent, budget.peak
            trials[name].append((share, visits))
        return {**trials}

    def usage(self, trials: Trials, passes: Trials = (), probe_rows: int = 0) -> Usage:
        """Return the usage of a whole step.

        Args:
            trials: Measurements of the step.
            passes: For a survey, measurements of a forward pass.
            probe_rows: Number of rows of each probe.
        """
        forward = dict[int, float]()
        for index in set(self.stands_for) if passes else ():
            seconds = [(share, min(visits.of[index]).seconds) for share, visits in passes]
            forward[index] = line(seconds, probe_rows / self._rows) - line(seconds, 0.0)
        stream = 4 * self._run.stream.columns * self._run.options.length * probe_rows
        wholes = [(share, self._whole(visits, forward, stream)) for share, visits in trials]
        return Usage(*(line([(share, whole[field]) for share, whole in wholes], 1.0) for field in range(2)))

    def _whole(self, visits: Visits, forward: Mapping[int, float], stream: int) -> Usage:
        """Return the usage of all blocks on the rows of a trial.

        Args:
            visits: Measurements of some blocks.
            forward: Seconds that a probe takes in each of them.
            stream: Bytes of the stream of a probe.
        """
        seconds, probes = visits.rest, 0
        for index in self.stands_for[: visits.stop]:
            visit = min(visits.of[index])
            seconds += max(0.0, visit.seconds + (probes - visit.probes) * forward.get(index, 0.0))
            probes += visit.begun
        measured = sum(visit.begun for all in visits.of.values() for visit in all)
        return Usage(seconds, visits.peak + stream * (probes - measured))


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
    usages = usage_by_effort(run, rows, plan, efforts)
    seconds = {effort: opened + usage.seconds for effort, usage in usages.items()}
    peak = min(round(resident + usages[options.effort].bytes), limit)
    summary = summarize(run, rows, plan)
    return replace(summary, seconds=seconds[options.effort], peak_bytes=peak, effort_seconds=seconds)


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
    needed: list[float] = [resident_bytes(stream, run.options, grouped.fits()[0].tokens)]
    if _needs_gradients(run, plan):
        needed.append(GRADIENT_BYTES * max(block.parameters for block in stream.blocks))
    if SELF in run.options.sources:
        cache_bytes = cache_meter(stream, stream.checkpoint.dtype).dense
        needed.append(generation_bytes(stream.checkpoint, length=run.options.length, cache_bytes=cache_bytes))
    return max(needed)


def _stand_ins(blocks: Sequence[Block], plan: Plan) -> list[int]:
    """Return for each block the index of the block that is measured in its place.

    Both blocks have the same shape, and either both are pruned or neither is. Of several pruned blocks, the one whose
    size is nearest to their mean is measured.
    """
    groups: list[list[int]] = []
    for index, block in enumerate(blocks):
        is_pruned = index in plan.widths
        alike = (group for group in groups if blocks[group[0]] == block and (group[0] in plan.widths) == is_pruned)
        if (group := next(alike, None)) is None:
            groups.append(group := [])
        group.append(index)
    found = [0] * len(blocks)
    for group in groups:
        sizes = {index: blocks[index].parameters_at(plan.widths.get(index, blocks[index].width)) for index in group}
        mean = sum(sizes.values()) / len(group)
        nearest = min(group, key=lambda index: abs(sizes[index] - mean))
        for index in group:
            found[index] = nearest
    return found


def line(points: Sequence[tuple[float, float]], x: float) -> float:
    """Return the value at x on the line through two points, or through one point and the origin; it does not fall."""
    (left, low), (right, high) = points if len(points) > 1 else ((0.0, 0.0), *points)
    return low + max(0.0, high - low) / (right - left) * (x - left)
