"""Options of `retrain`, with their defaults; mistakes are found before anything slow starts."""

from dataclasses import dataclass

from secateur.base.errors import SecateurError
from secateur.base.options import option
from secateur.commands.options import CALIBRATION
from secateur.text.sources import GENERAL, RANDOM, SELF

TRAINING = "Training"


@dataclass(frozen=True)
class Training:
    """Options of a training. A value that is wrong for every model raises `SecateurError`."""

    calibration: str = option(
        GENERAL,
        CALIBRATION,
        "Text to train on: general, general+TEXT or TEXT, as for secateur prune. TEXT is a file, - for standard "
        "input, or a data set.",
    )
    samples: int = option(1024, CALIBRATION, "Number of rows to train on, drawn from the text at random.")
    length: int = option(128, CALIBRATION, "Tokens in each row.")
    seed: int = option(0, CALIBRATION, "Random seed for the rows, their order and the initial adapters.")
    teacher: str | None = option(
        None,
        TRAINING,
        "The model before pruning. The pruned model then learns to match the output distribution and residual stream "
        "of this model, not the tokens of the text.",
        default_text="none",
    )
    epochs: int = option(2, TRAINING, "Number of passes over the rows.")
    batch: int = option(16, TRAINING, "Rows in each training step.")
    rank: int = option(8, TRAINING, "Rank of the LoRA adapters; 0 trains all weights of the blocks instead.")
    learning_rate: float = option(1e-4, TRAINING, "Learning rate of the first step; it decreases to zero.")

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch", 1), ("rank", 0)):
            if getattr(self, name) < least:
                raise SecateurError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 < self.learning_rate < 1:
            raise SecateurError(f"learning rate is {self.learning_rate}; it must lie between 0 and 1, such as 1e-4")
        if not 0 <= self.seed < 2**32:
            raise SecateurError(f"seed is {self.seed}; it must lie between 0 and {2**32 - 1}")
        if self.calibration == RANDOM:
            raise SecateurError("calibration is 'random', but random token ids teach nothing; name a text or data set")
        if self.calibration == SELF:
            raise SecateurError("calibration is 'self', but retraining needs text; name a text or data set")
        # Imported here, so that `secateur retrain --help` does not wait for torch.
        from secateur.text.calibration import check_calibration

        check_calibration(self.calibration, samples=self.samples, length=self.length)
