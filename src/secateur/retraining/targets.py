"""Targets of a training: for every position, tokens and their probabilities, from a text or from the teacher.

The teacher runs block by block from disk, so that it is never in memory together with the pruned model. Its likeliest
tokens are computed once for all rows and kept in a file.

Shapes: t tokens in a row, k targets of a position.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.base.device import fast_dtype
from secateur.base.errors import SecateurError
from secateur.base.processes import Processes
from secateur.base.run_folder import saving_state
from secateur.model.arena import Activations, Arena
from secateur.model.pass_checkpoint import PassCheckpoint, read_activations, write_activations
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.retraining.loss import IN_CACHE, LOGITS_AT_ONCE
from secateur.retraining.rows import TrainingRows
from secateur.survey.loss import mean_loss

LIKELIEST = 64
"""Number of tokens of a position whose probabilities are kept; the others count together."""
TARGET_BYTES = 6 * LIKELIEST
"""Bytes of the targets of a position: tokens in int32, logarithms of probabilities in float16."""
STREAM_BYTES = 4
"""Bytes per token and hidden dimension of the teacher's saved state, of which two may be on the disk."""
ROWS_AT_ONCE = 256
"""Number of rows whose targets one process sends to the others at a time."""
STEP, FILE = "teacher", "targets"
"""Names of the step and of its file in the run folder."""


Parts = tuple[Activations, Activations]
"""The teacher's likeliest tokens at every position (int32), and logarithms of their probabilities (float16)."""


@dataclass(frozen=True)
class Targets:
    """Target distributions of rows: mixtures of the teacher's distribution and the next token of the text."""

    rows: Tensor
    """Token ids (rows x t)."""
    text_weight: float = 1.0
    """Probability of the next token in the mixture; the teacher's distribution has the rest."""
    teacher: Parts | None = None
    """Likeliest tokens of the teacher (each rows x t x k); None to learn the text alone."""
    held_out_loss: float | None = None
    """The teacher's loss on held-out rows, in nats per token."""

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the target tokens of rows (row numbers), and the logarithms of their probabilities (rows x t x k).

        The last position of a row has no next token: it keeps the teacher's distribution, or is left out.
        """
        following = self.rows[rows][:, 1:, None]
        if self.teacher is None:
            return following, torch.zeros(following.shape)
        likeliest, logarithms = (torch.stack([part.parts[0][int(row)] for row in rows]) for part in self.teacher)
        ids, log_p = likeliest.long(), logarithms.float()
        if self.text_weight:
            _mix(ids[:, :-1], log_p[:, :-1], following, self.text_weight)
        return ids, log_p


def _mix(ids: Tensor, log_p: Tensor, following: Tensor, weight: float) -> None:
    """Give the next tokens (rows x t x 1) a probability in the teacher's distributions (rows x t x k), in place."""
    log_p += math.log1p(-weight)
    same = ids == following
    # A next token that is not among the teacher's likeliest takes the place of the last of them.
    place = torch.where(same.any(-1), same.int().argmax(-1), log_p.argmin(-1))[..., None]
    own = torch.where(same.any(-1, keepdim=True), log_p.gather(-1, place), -math.inf)
    ids.scatter_(-1, place, following)
    log_p.scatter_(-1, place, own.logaddexp(torch.full_like(own, math.log(weight))))


def teacher_bytes(teacher: BlockStream, tokens: int, memory: int, *, least: int) -> int:
    """Return the bytes of disk space that a training with a teacher needs for its state.

    Args:
        teacher: The dense model.
        tokens: Number of tokens to train on.
        memory: Bytes of memory for activations and targets. What does not fit is kept in temporary files.
        least: Bytes of the training's own checkpoints, which are written after the teacher has finished.
    """
    stream, targets = STREAM_BYTES * teacher.width * tokens, TARGET_BYTES * tokens
    has_room = memory >= stream + targets
    while_teacher_runs = 2 * stream + (0 if has_room else stream + targets)
    while_training = least + (0 if has_room else teacher.processes.size * targets)
    return targets + max(while_teacher_runs, while_training)


def teacher_targets(teacher: BlockStream, rows: TrainingRows, text_weight: float, arena: Arena) -> Targets:
    """Return targets with the teacher's distributions: from the run folder, or computed by all processes together.

    Args:
        teacher: The dense model, on its device.
        rows: The rows of the training.
        text_weight: Share of the text in the mixture with the teacher's distributions, from 0 to below 1.
        arena: Room for the targets, which must stay open as long as they are used.

    Raises:
        SecateurError: Logits are not finite, or the saved targets are damaged.
        StoppedError: The disk is full.
    """
    services = teacher.services
    file = None if services.run_folder is None else services.run_folder.path / FILE
    result = services.saved_result(STEP, lambda: _compute(teacher, rows, file))
    parts = _empty(arena, Rows.of(rows.train), teacher)
    if file is not None:
        read_activations(file, parts, Processes(), result["hash"])
    _send(parts, services.processes)
    return Targets(rows.train, text_weight, parts, result["held_out_loss"])


def _compute(teacher: BlockStream, rows: TrainingRows, file: Path | None) -> dict[str, Any]:
    """Run the teacher over all rows, block by block, and write the targets of all processes to a file of rank 0.

    Returns:
        The hash of the file, and the teacher's loss on the held-out rows in nats per token.
    """
    services, every = teacher.services, Rows.of(rows.train).with_held_out(rows.held_out)
    mine, checkpoint = teacher.local_rows(every), PassCheckpoint(services, STEP)
    with teacher.arena() as arena, teacher.multiplying_in(fast_dtype(teacher.device)):
        hidden = teacher.embed(mine, arena)
        for index in checkpoint.blocks(len(teacher), "Run the teacher", lambda: [hidden]):
            with teacher.filled(index) as layer:
                teacher.advance(index, layer, mine, hidden)
        parts = _empty(arena, Rows.of(mine.groups[0]), teacher)
        with teacher.head() as head:
            batches = [at for at in mine.batches() if at.group == 0]
            for at in services.watcher.track(batches, "Save predictions"):
                for part, values in zip(parts, _likeliest(teacher, head, hidden[at]), strict=True):
                    part[at] = values
        loss = mean_loss(teacher, every, 1, hidden)
        if not math.isfinite(loss):
            raise SecateurError(f"{teacher.checkpoint.source}: NaN or infinite logits; check the weights")
        with nullcontext() if file is None else saving_state(file, file):
            return {"hash": write_activations(file, parts, services.processes), "held_out_loss": loss}


def _empty(arena: Arena, rows: Rows, teacher: BlockStream) -> Parts:
    """Return uninitialised targets of rows."""
    count = min(LIKELIEST, teacher.checkpoint.config.vocab_size)
    return arena.empty(rows, count, torch.int32), arena.empty(rows, count, torch.float16)


def _likeliest(teacher: BlockStream, head: Callable[[Tensor], Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return the likeliest tokens at each position of a batch, and the logarithms of their probabilities (b t x k).

    Args:
        teacher: The dense model.
        head: Function from hidden states to logits.
        hidden: Output of the last block (b x t x d).
    """
    vocabulary, found = teacher.checkpoint.config.vocab_size, []
    for some in hidden.flatten(0, 1).split(max(1, LOGITS_AT_ONCE // vocabulary)):
        with teacher.layer_products():
            logits = head(some)
        for few in logits.split(max(1, IN_CACHE // vocabulary)):
            values, ids = few.float().topk(min(LIKELIEST, vocabulary), sorted=False)
            found.append((ids.int(), (values - few.float().logsumexp(-1, keepdim=True)).half()))
    ids, log_p = (torch.cat(parts) for parts in zip(*found, strict=True))
    return ids, log_p


def _send(parts: Parts, processes: Processes) -> None:
    """Send the targets of all rows from rank 0 to the other processes."""
    count = len(parts[0].parts[0])
    for start in range(0, count, ROWS_AT_ONCE) if not processes.is_single else ():
        at = slice(start, min(start + ROWS_AT_ONCE, count))
        for part in parts:
            values = {"": part.parts[0][at]} if processes.is_first else None
            part.parts[0][at] = processes.broadcast_tensors(values, 0, torch.device("cpu"))[""]
