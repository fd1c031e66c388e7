"""Options of `retrain`, with their defaults; mistakes are found before anything slow starts."""

from dataclasses import dataclass

from secateur.base.errors import SecateurError
from secateur.base.options import check_types, option
from secateur.base.words import parse_count
from secateur.steps.options import CALIBRATION
from secateur.text.sources import GENERAL, RANDOM, SELF

TRAINING = "Training"
NO_TEACHER = "none"
"""Value of `--teacher` with which the model learns the text itself."""
ADAPTERS = 16
"""Rank of the adapters that are trained where all weights do not fit into memory."""
DEFAULT_TOKENS = "128k"
"""Number of tokens to train on."""


@dataclass(frozen=True)
class Training:
    """Options of a training. A value that is wrong for every model raises `SecateurError`."""

    calibration: str = option(
        GENERAL,
        CALIBRATION,
        "Text to train on: general, general+TEXT or TEXT, as for secateur prune. TEXT is a file, - for standard "
        "input, or a data set. A text with fewer tokens than --tokens is read several times, each time cut at other "
        "places.",
    )
    length: int = option(128, CALIBRATION, "Tokens in each row.")
    seed: int = option(0, CALIBRATION, "Random seed for the rows, their order and the initial adapters.")
    tokens: str = option(
        DEFAULT_TOKENS,
        TRAINING,
        "Number of tokens to train on, such as 128k or 1M (k is 1,024 and M is 1,024 k).",
    )
    teacher: str | None = option(
        None,
        TRAINING,
        "The model whose next-token distributions are learned: a folder, a hub id or a .gguf file. With none, the "
        "model learns from the text only.",
        default_text="the model that was pruned",
    )
    text_weight: float = option(
        0.5,
        TRAINING,
        "Weight of the text in the loss, at least 0 and below 1. The teacher has the remaining weight: with 0, the "
        "model learns from the teacher only.",
    )
    rank: int | None = option(
        None,
        TRAINING,
        "Rank of the LoRA adapters to train; 0 trains all weights of the blocks.",
        default_text=f"0 if that fits into memory, else {ADAPTERS}",
    )
    batch: int = option(8, TRAINING, "Rows in each training step.")
    learning_rate: float | None = option(
        None,
        TRAINING,
        "Highest learning rate. It rises to this value in the first steps, then falls to zero as a cosine.",
        default_text="2e-4, or 1e-3 for adapters",
    )

    def __post_init__(self) -> None:
        if type(self.tokens) is int:
            object.__setattr__(self, "tokens", str(self.tokens))
        check_types(self)
        for name, least in (("batch", 1), ("rank", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise SecateurError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 <= self.text_weight < 1:
            raise SecateurError(
                f"text weight is {self.text_weight}; it must be at least 0 and below 1; --teacher none learns the text "
                "alone"
            )
        if self.teacher == NO_TEACHER and self.text_weight != Training.text_weight:
            raise SecateurError("text weight is given together with --teacher none, with which the text has all of it")
        if not 0 < self.highest_rate < 1:
            raise SecateurError(f"learning rate is {self.learning_rate}; it must lie between 0 and 1, such as 1e-4")
        if not 0 <= self.seed < 2**32:
            raise SecateurError(f"seed is {self.seed}; it must lie between 0 and {2**32 - 1}")
        if self.calibration == RANDOM:
            raise SecateurError("calibration is 'random', but random token ids teach nothing; name a text or data set")
        if self.calibration == SELF:
            raise SecateurError("calibration is 'self', but retraining needs text; name a text or data set")
        # Imported here, so that `secateur retrain --help` does not wait for torch.
        from secateur.text.calibration import check_calibration

        check_calibration(self.calibration, length=self.length)
        self.steps_of(self.token_count)

    @property
    def token_count(self) -> int:
        """Number of tokens that `--tokens` asks for."""
        count = parse_count(self.tokens)
        if count is None:
            raise SecateurError(f"tokens is '{self.tokens}'; write a number such as 131072, 128k or 1M")
        return count

    @property
    def ways(self) -> tuple[tuple[int, bool], ...]:
        """Ranks, each with whether the blocks are trained in bfloat16; the first one that fits into memory is taken."""
        if self.rank:
            return ((self.rank, False),)
        whole = ((0, False), (0, True))
        return whole if self.rank == 0 else (*whole, (ADAPTERS, False))

    @property
    def highest_rate(self) -> float:
        """Learning rate after the first steps."""
        return (1e-3 if self.rank else 2e-4) if self.learning_rate is None else self.learning_rate

    def steps_of(self, tokens: int) -> int:
        """Return the number of training steps on a number of tokens.

        Raises:
            SecateurError: The tokens do not fill one step.
        """
        steps = tokens // (self.batch * self.length)
        if steps < 1:
            raise SecateurError(
                f"tokens is {tokens:,}, but one step takes {self.batch} rows of {self.length} tokens; use at least "
                f"{self.batch * self.length:,} tokens, or a smaller --batch"
            )
        return steps
