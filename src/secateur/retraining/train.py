"""Training loop: AdamW with a rising and falling rate, and checkpoints in a folder from which a stopped training
resumes, with any number of processes."""

import math
from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.files import remove
from secateur.base.json_files import damaged_state, read_hashed, write_hashed
from secateur.base.processes import Processes, connection_errors
from secateur.base.quiet import quiet
from secateur.base.run_folder import saving_state
from secateur.base.services import Services
from secateur.checkpoints.weights import list_tensors
from secateur.model import pass_checkpoint
from secateur.retraining.halved import MOMENTS, HalvedAdamW
from secateur.retraining.options import Training
from secateur.retraining.shares import gathered, set_share
from secateur.retraining.student import Student
from secateur.write.shards import ShardWriter

MEASUREMENTS = 10
"""Largest number of measurements of perplexity during a training."""
STEPS_BETWEEN = 16
"""Smallest number of steps between two measurements of perplexity, each of which takes as long as half a step."""
CHECKPOINT_BYTES = 12
"""Bytes of a trained parameter in a checkpoint: the weight and two moments of AdamW, in float32."""
STATE = "state.json"
"""Last file that is written of a checkpoint: number of steps, and what was measured."""
WARM_UP = 0.1
"""Share of the steps in which the learning rate rises."""
LARGEST_NORM = 1.0
"""Length to which longer gradients are cut."""


def train(
    student: Student,
    training: Training,
    folder: Path,
    *,
    held_out: Tensor,
    micro_batch: int,
    services: Services,
) -> list[dict[str, Any]]:
    """Train a network in place.

    Args:
        student: The network with its rows and targets.
        training: Batch, learning rate and seed.
        folder: Folder of the checkpoints, the same for all processes; the last one there is resumed.
        held_out: Rows on which perplexity is measured before the first step and now and then (rows x length).
        micro_batch: Rows that run through the network together.
        services: Processes that share each batch, and progress output.

    Returns:
        Entries with `step`, and `loss` (nats per token) or `held_out` (perplexity).

    Raises:
        SecateurError: The loss of a step, or the perplexity after it, is NaN or infinite.
        StoppedError: A checkpoint cannot be written, or another process has stopped.
    """
    steps, processes = len(student.rows) // training.batch, services.processes
    every = max(-(-steps // MEASUREMENTS), STEPS_BETWEEN)
    order = torch.randperm(steps * training.batch, generator=torch.Generator().manual_seed(training.seed))
    state = _State(student, folder, processes, training.seed)
    bar = cast("Generator[int, None, None]", services.watcher.track(range(state.done, steps), "Retrain", state.done))
    lost = nullcontext() if processes.is_single else connection_errors()
    # If the training fails, the bar is closed at once, so that it is not drawn after the error.
    with closing(bar), quiet(), lost:
        if not state.done:
            state.history.append(_measured(student, held_out, 0))
        for step in bar:
            state.set_rate(training.highest_rate * _rate(step, steps))
            rows = order[step * training.batch :][: training.batch].view(processes.size, -1)[processes.rank]
            parts = rows.split(micro_batch)
            losses = [_descended(student, part, len(parts)) for part in parts]
            loss = processes.total([sum(losses) / processes.size])
            if not math.isfinite(loss):
                raise SecateurError(f"the loss of step {step + 1} is {loss}; use a smaller --learning-rate")
            state.step()
            state.history.append({"step": step + 1, "loss": loss})
            is_last = step + 1 == steps
            if (step + 1) % every == 0 and not is_last:
                state.history.append(_measured(student, held_out, step + 1))
            state.save(is_last)
    return state.history


def _rate(step: int, steps: int) -> float:
    """Return the learning rate of a step, divided by the highest: it rises linearly, then falls as a cosine."""
    rising = round(WARM_UP * steps)
    if step < rising:
        return step / rising
    return (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2


def _descended(student: Student, rows: Tensor, parts: int) -> float:
    """Add the gradient of the mean loss of some rows, divided by the number of parts; return this loss so divided."""
    loss = student(rows)["loss"] / parts
    loss.backward()
    return float(loss.detach())


def _measured(student: Student, held_out: Tensor, step: int) -> dict[str, Any]:
    """Return the perplexity of held-out rows after a step."""
    try:
        return {"step": step, "held_out": student.perplexity(held_out)}
    except SecateurError as error:
        if not step:
            raise
        raise SecateurError(f"the perplexity after step {step} is not finite; use a smaller --learning-rate") from error


class _State:
    """Weights, moments and history of a training, in memory and in the last checkpoint.

    A checkpoint is written after the first and the last step, and in between as often as is cheap.

    Attributes:
        done: Number of steps so far.
        history: What `train` returns.
    """

    def __init__(self, student: Student, folder: Path, processes: Processes, seed: int):
        """Read the last complete checkpoint.

        Raises:
            SecateurError: A file of the checkpoint is damaged, for example after a power failure.
        """
        self._folder, self._processes = folder, processes
        self._trained = student.trained()
        self._optimizer: torch.optim.Optimizer = (
            HalvedAdamW(self._trained.values(), seed)
            if student.halved
            else torch.optim.AdamW(self._trained.values(), weight_decay=0.0, fused=True)
        )
        found = processes.broadcast(lambda: _last(folder))
        self.done: int = found["done"]
        self.history: list[dict[str, Any]] = found["history"]
        if self.done:
            self._read(_checkpoint(folder, self.done))
        self._saved, self._since, self._cost = self.done, perf_counter(), 0.0

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the next step."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def step(self) -> None:
        """Change the weights along the sum of gradients, which is then forgotten."""
        torch.nn.utils.clip_grad_norm_(self._trained.values(), LARGEST_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.done += 1

    def save(self, is_last: bool) -> None:
        """Write a checkpoint and remove the one before, unless that would take too much of the time."""
        start = perf_counter()
        is_cheap = start - self._since >= self._cost / pass_checkpoint.SPENT
        if not self._processes.broadcast(lambda: is_cheap or is_last):
            return
        place = _checkpoint(self._folder, self.done)
        with saving_state(self._folder, place):
            self._write(place)
        if self._processes.is_first and self._saved:
            remove(_checkpoint(self._folder, self._saved))
        self._saved, self._since = self.done, perf_counter()
        self._cost = self._since - start

    def _write(self, place: Path) -> None:
        """Write a checkpoint in process 0, with the shares of all processes."""
        writer = None
        if self._processes.is_first:
            place.mkdir(parents=True)
            writer = ShardWriter(place)
        for name, value in self._tensors():
            whole = gathered(value)
            if writer is not None:
                writer.add(name, whole)
        if writer is not None:
            writer.close()
            write_hashed(place / STATE, {"done": self.done, "history": self.history})

    def _read(self, place: Path) -> None:
        """Fill weights and moments from a checkpoint."""
        try:
            stored = list_tensors(place)
            for name, value in self._trained.items():
                if f"{name}.{MOMENTS[0]}" in stored:
                    moments = {moment: torch.zeros_like(value, requires_grad=False) for moment in MOMENTS}
                    done = torch.tensor(float(self.done), device=value.device)
                    self._optimizer.state[value] = {"step": done, **moments}
            for name, tensor in self._tensors():
                set_share(tensor, stored[name].read())
        except (SecateurError, OSError, KeyError) as error:
            raise damaged_state(place) from error

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield weights and moments by their names in a checkpoint."""
        for name, value in self._trained.items():
            yield name, value.detach()
            # The norm before a module that lost all units gets no gradient.
            for moment in MOMENTS if value in self._optimizer.state else ():
                yield f"{name}.{moment}", self._optimizer.state[value][moment]


def _checkpoint(folder: Path, steps: int) -> Path:
    """Return the folder of the checkpoint after some steps."""
    return folder / f"checkpoint-{steps}"


def _last(folder: Path) -> dict[str, Any]:
    """Return the state of the last complete checkpoint, and remove those that were not written to the end."""
    found: dict[str, Any] = {"done": 0, "history": []}
    for place in folder.glob("checkpoint-*"):
        if not (place / STATE).exists():
            remove(place)
        elif (state := read_hashed(place / STATE))["done"] > found["done"]:
            found = state
    return found
