"""Steps of a run on a sample: one block of each shape, and a small share of the rows.

The usage of a whole step follows from two shares. Each block is assumed to take as long as the measured block of its
shape. Between the shares and beyond them, time and memory are linear.

In a survey, the streams of all probes run on to the last block. A sample has few probes, so the others are added with
the time of a forward pass.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import NamedTuple

from secateur.base.memory import MemoryBudget
from secateur.base.progress import Silent
from secateur.base.services import Services
from secateur.model.arena import Activations
from secateur.model.pass_checkpoint import PassCheckpoint
from secateur.model.structure import Block
from secateur.plan.problem import Plan
from secateur.steps.open_model import OpenRun

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
    """Checkpoint of a pass that saves nothing, visits some blocks only, and measures the time of each visit."""

    def __init__(self, services: Services, indices: Sequence[int], clock: Clock):
        super().__init__(services)
        self.of: dict[int, list[Visit]] = {index: [] for index in indices}
        """Visits to each block."""
        self.stop = 0
        """Number of blocks of the whole pass."""
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


@dataclass(frozen=True)
class Trial:
    """Measurements of a step on a share of its rows."""

    share: float
    visits: Visits
    rest: float
    """Seconds outside the blocks."""
    peak: int
    """Largest number of bytes in the memory budget."""


class Sample:
    """Sample of a run.

    Attributes:
        stands_for: For each block, the index of the block that is measured in its place.
        shares: Shares of the rows: two, or all rows if they are few.
    """

    def __init__(self, run: OpenRun, plan: Plan, rows: int, clock: Clock = time.perf_counter):
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

    def try_out(self, steps: Mapping[str, Step]) -> dict[str, list[Trial]]:
        """Run each step on each share of its rows."""
        trials: dict[str, list[Trial]] = {name: [] for name in steps}
        for name, share in self._run.watcher.track([*product(steps, self.shares)], "Measure"):
            trials[name].append(self._try(steps[name], share))
        return trials

    def _try(self, step: Step, share: float) -> Trial:
        budget = MemoryBudget(self._run.services.budget.limit)
        stream = self._run.stream.using(budget=budget, watcher=Silent())
        visits = Visits(stream.services, sorted(set(self.stands_for)), self._clock)
        start = self._clock()
        step(replace(self._run, stream=stream), share, visits)
        spent = sum(visit.seconds for all in visits.of.values() for visit in all)
        return Trial(share, visits, self._clock() - start - spent, budget.peak)

    def usage(self, trials: Sequence[Trial], passes: Sequence[Trial] = (), probe_rows: int = 0) -> Usage:
        """Return the usage of a whole step.

        Args:
            trials: Measurements of the step.
            passes: For a survey, measurements of a forward pass.
            probe_rows: Number of rows of each probe.
        """
        forward = dict[int, float]()
        for index in set(self.stands_for) if passes else ():
            seconds = [(one.share, min(one.visits.of[index]).seconds) for one in passes]
            forward[index] = line(seconds, probe_rows / self._rows) - line(seconds, 0.0)
        stream = 4 * self._run.stream.columns * self._run.options.length * probe_rows
        wholes = [(one.share, self._whole(one, forward, stream)) for one in trials]
        return Usage(*(line([(share, whole[field]) for share, whole in wholes], 1.0) for field in range(2)))

    def _whole(self, trial: Trial, forward: Mapping[int, float], stream: int) -> Usage:
        """Return the usage of all blocks on the rows of a trial.

        Args:
            trial: Measurements of some blocks.
            forward: Seconds that a probe takes in each of them.
            stream: Bytes of the stream of a probe.
        """
        seconds, probes = trial.rest, 0
        for index in self.stands_for[: trial.visits.stop]:
            visit = min(trial.visits.of[index])
            seconds += max(0.0, visit.seconds + (probes - visit.probes) * forward.get(index, 0.0))
            probes += visit.begun
        measured = sum(visit.begun for visits in trial.visits.of.values() for visit in visits)
        return Usage(seconds, trial.peak + stream * (probes - measured))


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
