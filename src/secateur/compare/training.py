"""What can be asked of `retrain`, with its defaults, checked before anything slow."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.base.errors import SecateurError
from secateur.commands.options import SELF
from secateur.text.calibration import check_calibration
from secateur.text.documents import RANDOM


@dataclass(frozen=True)
class Training:
    """How the adapters are trained.

    Raises `SecateurError` for a value that makes no sense whatever the model.
    """

    calibration: str = "wikitext2"
    samples: int = 1024
    """Rows to train on."""
    length: int = 128
    epochs: int = 2
    batch: int = 16
    """Rows in a step."""
    rank: int = 8
    learning_rate: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, number in (("epochs", self.epochs), ("batch", self.batch), ("rank", self.rank)):
            if number < 1:
                raise SecateurError(f"{name} is {number}; it must be at least 1")
        if not 0 < self.learning_rate < 1:
            raise SecateurError(f"learning rate is {self.learning_rate}; it must lie between 0 and 1, such as 1e-4")
        if not 0 <= self.seed < 2**32:
            raise SecateurError(f"seed is {self.seed}; it must lie between 0 and {2**32 - 1}")
        if self.calibration == RANDOM:
            raise SecateurError("random ids teach nothing; name a text file or a data set")
        if self.calibration == SELF:
            raise SecateurError("a retraining reads its text: name a text file, a data set, or a file of kept rows")
        check_calibration(self.calibration, samples=self.samples, length=self.length)
