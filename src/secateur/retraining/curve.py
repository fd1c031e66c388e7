"""Course of a training: the loss of every step, and perplexity on held-out rows every now and then."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Curve:
    """Loss of every step, and perplexity on held-out rows before, during and after the training."""

    losses: tuple[float, ...]
    """Loss of every step, in nats per token."""
    perplexities: tuple[tuple[int, float], ...]
    """Number of steps done and perplexity on held-out rows; the first is before the training, the last after it."""
    dense: float | None
    """Perplexity of the teacher on the same rows; None where there is no teacher."""

    @classmethod
    def of(cls, history: list[dict[str, Any]], after: float, dense_loss: float | None) -> "Curve":
        """Return the course of a training.

        Args:
            history: Entries of the Trainer's log: `loss` or `held_out`, each with `step`.
            after: Perplexity of the weights as they are written.
            dense_loss: Loss of the teacher on held-out rows, in nats per token.
        """
        losses = tuple(entry["loss"] for entry in history if "loss" in entry)
        measured = [(entry["step"], entry["held_out"]) for entry in history if "held_out" in entry]
        points = (*(point for point in measured if point[0] < len(losses)), (len(losses), after))
        return cls(losses, points, None if dense_loss is None else math.exp(dense_loss))

    def as_json(self) -> dict[str, Any]:
        """Return the course as the record secateur.json holds it."""
        return {
            "losses": [round(loss, 5) for loss in self.losses],
            "perplexities": [[step, round(value, 5)] for step, value in self.perplexities],
        }
