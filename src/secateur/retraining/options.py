"""Options of `retrain`, with their defaults; mistakes are found before anything slow starts."""

import re
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
"""Number of tokens to train on, where neither `--tokens` nor `--time` is given."""
LONGEST = 10_000 * 86400
"""Most seconds of a training."""
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


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
    tokens: str | None = option(
        None,
        TRAINING,
        "Number of tokens to train on, such as 128k or 1M (k is 1,024 and M is 1,024 k).",
        default_text=DEFAULT_TOKENS,
    )
    time: str | None = option(
        None,
        TRAINING,
        "Time for the whole command, such as 30m or 2h, used instead of --tokens. The number of tokens is chosen from "
        "the speed of the first steps on this machine. Each token of the text is used about once at most.",
        default_text="none",
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
        for name in ("tokens", "time"):
            if type(value := getattr(self, name)) is int:
                object.__setattr__(self, name, str(value))
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
        if self.tokens is not None and self.time is not None:
            raise SecateurError("both --tokens and --time are given; leave one of them out")
        if self.time is not None:
            parse_time(self.time)
        # Imported here, so that `secateur retrain --help` does not wait for torch.
        from secateur.text.calibration import check_calibration

        check_calibration(self.calibration, length=self.length)
        self.steps_of(self.token_count)

    @property
    def token_count(self) -> int:
        """Number of tokens that `--tokens` asks for; with `--time`, a number to begin with, at least one step."""
        default = parse_tokens(DEFAULT_TOKENS)
        if self.time is not None:
            return max(default, self.batch * self.length)
        return default if self.tokens is None else parse_tokens(self.tokens)

    @property
    def seconds(self) -> float | None:
        """Seconds that `--time` allows; None where the number of tokens is given."""
        return None if self.time is None else parse_time(self.time)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of which the first one that fits into memory is taken."""
        return (0, ADAPTERS) if self.rank is None else (self.rank,)

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


def parse_tokens(text: str) -> int:
    """Return a number of tokens.

    Args:
        text: A whole number, or a number with k (1,024), M (1,024 k) or B (1,024 M).

    Raises:
        SecateurError: The text is neither.

    Example:
        >>> parse_tokens("128k")
        131072
    """
    count = parse_count(text)
    if count is None:
        raise SecateurError(f"tokens is '{text}'; write a number such as 131072, 128k or 1M")
    return count


def parse_time(text: str) -> float:
    """Return a time in seconds.

    Args:
        text: A number with s, m, h or d (seconds, minutes, hours or days).

    Raises:
        SecateurError: The text is not one.

    Example:
        >>> parse_time("1.5h")
        5400.0
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([smhd])", text.strip().lower())
    if match is None or not float(match[1]):
        raise SecateurError(f"time is '{text}'; write a time such as 90s, 30m or 2h")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if seconds > LONGEST:
        raise SecateurError(f"time is '{text}'; use at most {LONGEST // _SECONDS['d']:,}d, or --tokens")
    return seconds
