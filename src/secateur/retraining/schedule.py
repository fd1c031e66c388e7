"""Number of tokens of a training that may take a given time: the first steps are measured on this machine."""

import time
from collections.abc import Callable
from datetime import datetime, timedelta

import torch
from torch import Tensor

from secateur.base.device import fast_dtype
from secateur.base.errors import SecateurError
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.retraining.options import Training
from secateur.retraining.rows import HELD_OUT
from secateur.retraining.student import Student

PLANNED = 0.9
"""Share of the remaining time that is planned; the rest is for reading, measuring and writing."""


def tokens_in_time(
    training: Training, student: Student, teacher: BlockStream | None, *, micro_batch: int, processes: int, start: float
) -> int:
    """Return the number of tokens for which there is time.

    Args:
        training: The time, the batch and the length.
        student: The pruned model, with the rows of one step.
        teacher: The dense model; None where the text is learned.
        micro_batch: Rows that run through the network together.
        processes: Number of processes that share each batch.
        start: `time.perf_counter()` when the command began.

    Raises:
        SecateurError: There is no time for one step.
    """
    assert training.seconds is not None
    seconds_per_step = _step_seconds(student, training.batch // processes, micro_batch)
    fixed, seconds_per_row = (0.0, 0.0) if teacher is None else _teacher_seconds(teacher, student.rows)
    # Perplexity is measured at least before and after the training.
    rows = student.rows.repeat(-(-HELD_OUT // len(student.rows)), 1)[:HELD_OUT]
    fixed += 2 * _seconds(lambda: student.perplexity(rows))
    remaining = PLANNED * training.seconds - (time.perf_counter() - start) - fixed
    steps = int(remaining / (seconds_per_step + training.batch * seconds_per_row / processes))
    if steps < 1:
        needed = (training.seconds - remaining + seconds_per_step + training.batch * seconds_per_row) / PLANNED
        raise SecateurError(
            f"time is {training.time}, but one step takes {seconds_per_step:,.1f} s and all else "
            f"{training.seconds - remaining:,.1f} s; allow at least {needed:,.0f}s"
        )
    return steps * training.batch * training.length


def describe_end(training: Training, tokens: int) -> str:
    """Return a sentence about the end of a training that may take a given time."""
    end = datetime.now().astimezone() + timedelta(seconds=training.seconds or 0.0)
    return f"Training on {tokens:,} tokens, as many as fit into {training.time}; the command ends about {end:%H:%M}"


def _step_seconds(student: Student, share: int, micro_batch: int) -> float:
    """Return the seconds of the second of two steps, without a change of weights."""
    optimizer = torch.optim.AdamW(student.trained().values(), lr=0.0, weight_decay=0.0, fused=True)

    def step() -> None:
        for rows in torch.arange(share).split(micro_batch):
            student(rows)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return _seconds(step)


def _teacher_seconds(teacher: BlockStream, rows: Tensor) -> tuple[float, float]:
    """Return the seconds of the teacher's blocks to load, and of one row in all blocks and the output layer."""
    few = Rows.of(rows)
    with teacher.arena() as arena, teacher.multiplying_in(fast_dtype(teacher.device)):
        hidden = teacher.embed(few, arena)
        began = time.perf_counter()
        with teacher.filled(0) as layer:
            loading = time.perf_counter() - began
            teacher.advance(0, layer, few, hidden)
            block = _seconds(lambda: teacher.advance(0, layer, few, hidden))
        with teacher.head() as head, teacher.layer_products():
            output = _seconds(lambda: head(hidden.parts[0][0]).topk(1))
    return loading * len(teacher), block * len(teacher) / len(rows) + output


def _seconds(run: Callable[[], object]) -> float:
    """Return the seconds that a function takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
