"""Targets of a training: for every position, tokens and their probabilities, from a text or from the teacher.

The teacher runs block by block from disk, so that it never stands in memory beside the pruned model. Its likeliest
tokens are computed once for all rows and kept in a file.

Shapes: t tokens in a row, k targets of a position.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from secateur.base.device import fast_dtype
from secateur.base.errors import SecateurError, StoppedError
from secateur.base.files import is_disk_full
from secateur.base.processes import Processes
from secateur.model.activation_file import read_activations, write_activations
from secateur.model.arena import Activations, Arena
from secateur.model.pass_checkpoint import PassCheckpoint
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.retraining.loss import LOGITS_AT_ONCE
from secateur.retraining.rows import TrainingRows
from secateur.survey.loss import mean_loss

LIKELIEST = 64
"""Number of tokens of a position whose probabilities are kept; the others count together."""
ROWS_AT_ONCE = 256
"""Number of rows whose targets one process sends to the others at a time."""
STEP, FILE = "teacher", "targets"
"""Names of the step and of its file in the run folder."""


Parts = tuple[Activations, Activations]
"""Target tokens, and logarithms of their probabilities."""


class Targets(Protocol):
    """Target distributions of rows."""

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the target tokens of rows (row numbers), and the logarithms of their probabilities (rows x t x k)."""


class TextTargets(NamedTuple):
    """The next token of the text, with probability 1; the last position of a row has none."""

    rows: Tensor
    """Token ids (rows x t)."""

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next tokens (rows x t - 1 x 1) and zeros."""
        ids = self.rows[rows][:, 1:, None]
        return ids, torch.zeros(ids.shape)


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher's likeliest tokens at every position, with the logarithms of their probabilities."""

    ids: Activations
    """Tokens, int32 (rows x t x k)."""
    log_p: Activations
    """Logarithms of their probabilities, float16 (rows x t x k)."""
    held_out_loss: float
    """The teacher's loss on held-out rows, in nats per token."""

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the target tokens of rows (row numbers), and the logarithms of their probabilities (rows x t x k)."""
        ids, log_p = (torch.stack([part.parts[0][int(row)] for row in rows]) for part in (self.ids, self.log_p))
        return ids.long(), log_p.float()


def teacher_targets(teacher: BlockStream, rows: TrainingRows, arena: Arena) -> TeacherTargets:
    """Return the teacher's targets for all rows: from the run folder, or computed by all processes together.

    Args:
        teacher: The dense model, on its device.
        rows: The rows of the training.
        arena: Room for the targets, which must stay open as long as they are used.

    Raises:
        SecateurError: Logits are not finite, or the saved targets are damaged.
        StoppedError: The disk is full.
    """
    services, trained = teacher.services, Rows.of(rows.train)
    count = min(LIKELIEST, teacher.checkpoint.config.vocab_size)
    parts = arena.empty(trained, count, torch.int32), arena.empty(trained, count, torch.float16)
    folder = services.run_folder
    file = None if folder is None else folder.path / FILE

    def compute() -> dict[str, Any]:
        """Compute and save the targets; return the hash of the file and the loss on held-out rows."""
        loss = _compute(teacher, rows, parts)
        return {"hash": "" if file is None else _write(file, parts), "held_out_loss": loss}

    is_saved = services.processes.broadcast(lambda: folder is not None and folder.has_result(STEP))
    result = services.saved_result(STEP, compute)
    if is_saved:
        if file is not None:
            read_activations(file, parts, Processes(), result["hash"])
        _send(parts, 0, slice(0, len(rows.train)), services.processes)
    return TeacherTargets(*parts, result["held_out_loss"])


def _compute(teacher: BlockStream, rows: TrainingRows, parts: Parts) -> float:
    """Run the teacher over all rows, block by block, and keep its likeliest tokens at every process.

    Returns:
        Its loss on the held-out rows, in nats per token.
    """
    services, every = teacher.services, Rows.of(rows.train).with_held_out(rows.held_out)
    mine, checkpoint = teacher.local_rows(every), PassCheckpoint(services, STEP)
    spans = [teacher.spans_of(every, rank)[0] for rank in range(services.processes.size)]
    with teacher.arena() as arena, teacher.multiplying_in(fast_dtype(teacher.device)):
        hidden = teacher.embed(mine, arena)
        for index in checkpoint.blocks(len(teacher), "Run the teacher", lambda: [hidden]):
            with teacher.filled(index) as layer:
                teacher.advance(index, layer, mine, hidden)
        with teacher.head() as head:
            batches = [at for at in mine.batches() if at.group == 0]
            for at in services.watcher.track(batches, "Predict"):
                first = spans[services.processes.rank].start + at.rows.start
                _keep_likeliest(teacher, head, hidden[at], parts, first)
        loss = mean_loss(teacher, every, 1, hidden)
    for owner, span in enumerate(spans):
        _send(parts, owner, span, services.processes)
    if not math.isfinite(loss):
        raise SecateurError(f"{teacher.checkpoint.source}: NaN or infinite logits; check the weights")
    return loss


def _keep_likeliest(
    teacher: BlockStream, head: Callable[[Tensor], Tensor], hidden: Tensor, parts: Parts, first: int
) -> None:
    """Write the likeliest tokens of a batch into the targets.

    Args:
        teacher: The dense model.
        head: Function from hidden states to logits.
        hidden: Output of the last block (b x t x d).
        parts: Targets of all rows.
        first: Number of the batch's first row.
    """
    found = []
    at_once = max(1, LOGITS_AT_ONCE // teacher.checkpoint.config.vocab_size)
    for some in hidden.flatten(0, 1).split(at_once):
        with teacher.layer_products():
            logits = head(some).float()
        values, ids = logits.topk(parts[0].parts[0].shape[-1], sorted=False)
        found.append((ids.int().cpu(), (values - logits.logsumexp(-1, keepdim=True)).half().cpu()))
    for part, computed in zip(parts, zip(*found, strict=True), strict=True):
        stored = part.parts[0]
        stored[first : first + len(hidden)] = torch.cat(computed).view(len(hidden), *stored.shape[1:])


def _write(file: Path, parts: Parts) -> str:
    """Write targets to a file, and return its hash.

    Raises:
        StoppedError: The disk is full.
    """
    try:
        return write_activations(file, parts, Processes())
    except OSError as error:
        file.unlink(missing_ok=True)
        if not is_disk_full(error):
            raise
        raise StoppedError(f"{file}: the disk is full; free some space and run the same command again") from error


def _send(parts: Parts, owner: int, rows: slice, processes: Processes) -> None:
    """Send the targets of some rows from one process to all others."""
    for start in range(rows.start, rows.stop, ROWS_AT_ONCE) if not processes.is_single else ():
        at = slice(start, min(start + ROWS_AT_ONCE, rows.stop))
        for part in parts:
            values = {"": part.parts[0][at]} if processes.rank == owner else None
            part.parts[0][at] = processes.broadcast_tensors(values, owner, torch.device("cpu"))[""]
