"""What a person can ask of `prune`, with its defaults, checked before anything slow is imported or read."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import get_args

from secateur.errors import SecateurError
from secateur.structure import KINDS, Kind

CRITERIA = ("surgeon", "second-moment", "wanda", "l1", "l2", "random")
RECOVERIES = ("refit", "paper", "none")
WHEN = ("after", "before", "both")
SHARES = ("blocks", "model")
WIDTHS = ("uniform",)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Options:
    """Everything that decides the result of `prune`, besides the model itself.

    Raises `SecateurError` for a value that makes no sense whatever the model.
    """

    sparsity: float = 0.25
    """Share of parameters to remove."""
    of: str = "blocks"
    """What the share counts: the pruned `blocks`, or the whole `model`."""
    blocks: str | None = None
    """Which blocks, `first:end` with the end left out; all by default."""
    modules: tuple[Kind, ...] = KINDS
    """Which units may go: `heads`, `channels`."""
    widths: str = "uniform"
    criterion: str = "surgeon"
    recovery: str = "refit"
    recover: str = "after"
    """When the recovery happens: `before` the choice of units, `after` it, or `both`."""
    ridge: float = 0.3
    """Pull of the refit toward the old weights, relative to each input's energy."""
    intercept: bool = False
    """Fit a level-2 bias even where the architecture stores none."""
    calibration: str = "wikitext2"
    samples: int = 128
    length: int = 128
    seed: int = 0
    multiple: int = 1
    """Feed-forward widths are rounded to it (`--round`)."""
    dtype: str | None = None
    """Of the output; that of the input by default."""

    def __post_init__(self) -> None:
        if not (isinstance(self.sparsity, int | float) and math.isfinite(self.sparsity) and 0 < self.sparsity < 1):
            raise SecateurError(f"sparsity is {self.sparsity}; it must lie between 0 and 1, for example 0.25")
        for name, value, allowed in (
            ("of", self.of, SHARES),
            ("widths", self.widths, WIDTHS),
            ("criterion", self.criterion, CRITERIA),
            ("recovery", self.recovery, RECOVERIES),
            ("recover", self.recover, WHEN),
            ("dtype", self.dtype, (None, *DTYPES)),
        ):
            if value not in allowed:
                choices = ", ".join(str(choice) for choice in allowed if choice)
                raise SecateurError(f"{name} is '{value}'; it must be one of {choices}")
        wrong = [kind for kind in self.modules if kind not in get_args(Kind)]
        if wrong or not self.modules or len(set(self.modules)) < len(self.modules):
            raise SecateurError(f"modules is '{','.join(self.modules)}'; give heads, channels or heads,channels")
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise SecateurError(f"ridge is {self.ridge}; it must be zero or positive, for example 0.3")
        for name, number, least in (
            ("samples", self.samples, 1),
            ("length", self.length, 2),
            ("round", self.multiple, 1),
        ):
            if number < least:
                raise SecateurError(f"{name} is {number}; it must be at least {least}")
        if not 0 <= self.seed < 2**32:
            raise SecateurError(f"seed is {self.seed}; it must lie between 0 and {2**32 - 1}")
        if self.blocks is not None and re.fullmatch("[0-9]*:[0-9]*", self.blocks) is None:
            raise SecateurError(f"blocks is '{self.blocks}'; write first:end, for example 4:30")
        if self.intercept and self.recovery == "none":
            raise SecateurError("an intercept is part of the refit: leave --intercept out, or use --recovery refit")

    def chosen_blocks(self, count: int) -> range:
        """The block range for a model of `count` blocks."""
        if self.blocks is None:
            return range(count)
        first, _, last = self.blocks.partition(":")
        start, stop = int(first or 0), int(last or count)
        if stop > count or start >= count:
            raise SecateurError(f"blocks is '{self.blocks}', but the model has {count} blocks (0:{count})")
        if start >= stop:
            raise SecateurError(f"blocks is '{self.blocks}', which is empty or reversed; the end must be larger")
        return range(start, stop)
