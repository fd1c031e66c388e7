"""Number of tokens of a training that may take a given time: the first steps are measured on this machine."""

import time
from collections.abc import Callable
from datetime import datetime
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.base.device import clock, fast_dtype
from secateur.base.errors import SecateurError
from secateur.base.processes import Processes
from secateur.measure.perplexity import device_of
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.retraining.options import Training
from secateur.retraining.rows import HELD_OUT
from secateur.retraining.student import Student
from secateur.retraining.train import MEASUREMENTS, STEPS_BETWEEN

PLANNED = 0.85
"""Planned share of the remaining time. Checkpoints may take a third of what is left (`pass_checkpoint.SPENT`)."""
END, LONGEST_END = 0.1, 10.0
"""Share of the time of the start that the end of the process takes (the libraries are unloaded), and its most seconds.
"""


class Seconds(NamedTuple):
    """Seconds that the parts of a training take."""

    step: float
    """Seconds of one step of the training, with its share of the teacher's pass."""
    measurement: float
    """Seconds of one measurement of perplexity on the held-out rows."""
    rest: float
    """Time that does not depend on the number of steps: reading the teacher and running it on the held-out rows."""

    def steps_in(self, available: float) -> int:
        """Return the largest number of steps for which the available seconds are enough."""
        # Before and after the training, and in between every 16th step or ten times, whichever is rarer.
        left = available - self.rest - 2 * self.measurement
        often = left / (self.step + self.measurement / STEPS_BETWEEN)
        return int(max(often, (left - MEASUREMENTS * self.measurement) / self.step))

    @property
    def least(self) -> float:
        """Seconds of a training of one step."""
        return self.rest + 2 * self.measurement + self.step


def tokens_in_time(training: Training, seconds: Seconds, deadline: float) -> int:
    """Return the number of tokens for which there is time.

    Args:
        training: The time, the batch and the length.
        seconds: Seconds that parts of the training take.
        deadline: `time.time()` at which the command has to end.

    Raises:
        SecateurError: There is no time for one step.
    """
    assert training.seconds is not None
    left = deadline - time.time()
    gone = training.seconds - left
    end = min(END * gone, LONGEST_END)
    steps = seconds.steps_in(PLANNED * (left - end))
    if steps < 1:
        raise SecateurError(
            f"time is {training.time}, of which {gone:,.1f} s are over, and a training of one step takes "
            f"{seconds.least:,.1f} s; allow at least {gone + end + seconds.least / PLANNED + 1:,.0f}s"
        )
    return steps * training.batch * training.length


def describe_end(deadline: float) -> str:
    """Return a sentence about the time (`time.time()`) at which the command has to end, with the day if not today."""
    end = datetime.fromtimestamp(deadline).astimezone()
    day = "" if end.date() == datetime.now().date() else f"{end:%Y-%m-%d }"
    return f"This command ends by {day}{end:%H:%M:%S}"


def measure_seconds(
    training: Training, student: Student, teacher: BlockStream | None, micro_batch: int, processes: Processes
) -> Seconds:
    """Measure how long the parts of a training take, without a change of weights.

    Args:
        training: The batch.
        student: The pruned model, with the rows of one step.
        teacher: The dense model; None where the text is learned.
        micro_batch: Rows that run through the network together.
        processes: Processes that share each batch.
    """
    loading, row = (0.0, 0.0) if teacher is None else _teacher_seconds(teacher, student.rows)
    share, rows = training.batch // processes.size, student.rows
    step = _step_seconds(student, share, micro_batch, processes) + share * row
    held_out = rows.repeat(-(-HELD_OUT // len(rows)), 1)[:HELD_OUT]
    measurement = _seconds(lambda: student.perplexity(held_out), device_of(student.network))
    return Seconds(step, measurement, loading + HELD_OUT * row)


def _step_seconds(student: Student, share: int, micro_batch: int, processes: Processes) -> float:
    """Return the seconds of the second of two steps, in which all processes add their gradients."""
    trained = list(student.trained().values())
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)

    def step() -> None:
        for rows in torch.arange(share).split(micro_batch):
            student(rows)["loss"].backward()
        processes.all_reduce(*(value.grad for value in trained if value.grad is not None))
        optimizer.step()
        optimizer.zero_grad()

    step()
    return _seconds(step, device_of(student.network))


def _teacher_seconds(teacher: BlockStream, rows: Tensor) -> tuple[float, float]:
    """Return the seconds of the teacher's blocks to load, and of one row in all blocks and the output layer."""
    few = Rows.of(rows)
    with teacher.arena() as arena, teacher.multiplying_in(fast_dtype(teacher.device)):
        hidden = teacher.embed(few, arena)
        began = clock(teacher.device)
        with teacher.filled(0) as layer:
            loading = clock(teacher.device) - began
            teacher.advance(0, layer, few, hidden)
            block = _seconds(lambda: teacher.advance(0, layer, few, hidden), teacher.device)
        with teacher.head() as head, teacher.layer_products():
            output = _seconds(lambda: head(hidden.parts[0][0]).topk(1), teacher.device)
    return loading * len(teacher), block * len(teacher) / len(rows) + output


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a function takes on a device."""
    began = clock(device)
    run()
    return clock(device) - began
