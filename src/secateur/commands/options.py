"""What a person can ask of `prune`, with its defaults, checked before anything slow is imported or read."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from secateur.base.errors import SecateurError
from secateur.criteria.choice import IDENTITY, LARGEST, Choice, parse_choice
from secateur.model.structure import KINDS, Kind
from secateur.plan.target import Target, parse_target

RECOVERIES = ("refit", "paper", "bias", "none")
WHEN = ("after", "before", "both")
SHARES = ("blocks", "model")
WIDTHS = ("adaptive", "uniform")
FORMATS = ("hf", "stock", "gguf")
SIGMAS = ("data", "identity", "random")
SELF = "self"
"""The calibration source that is no text: what the model itself writes."""
REWRITTEN = "rewritten"
MORE = (SELF, REWRITTEN)
MOST_RIDGE = 1_000_000
"""There, no weight moves; float32 ends far beyond."""
MOST_FITS = 64
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Options:
    """Everything that decides the result of `prune`, besides the model itself.

    Raises `SecateurError` for a value that makes no sense whatever the model.
    """

    sparsity: float | None = None
    """Share of parameters to remove; a quarter where there is neither a target nor a plan."""
    target: str | None = None
    """In place of a share, the most that the result may take: `params=80%`, `bytes=60MB`, `prefill=1.5x`, ..."""
    plan: str | None = None
    """In place of both, a file with each block's width, or the exact units to keep."""
    of: str = "blocks"
    """What the share counts: the pruned `blocks`, or the whole `model`."""
    blocks: str | None = None
    """Which blocks, `first:end` with the end left out; all by default."""
    modules: tuple[Kind, ...] = KINDS
    """Which units may go: `heads`, `channels`."""
    widths: str = "adaptive"
    """`adaptive`, each module its own; `uniform`, one for all blocks; or a file with ratios for block ranges."""
    criterion: str = "surgeon"
    """One for all units, `similarity`, `similarity+X`, or a pair, `heads=X,channels=Y`."""
    tau: float | str | None = None
    """With similarity: heads closer than this, in nats, are similar; `auto` finds the one for `sparsity`."""
    sigma: str | None = None
    """Where second-moment takes its Σ from: `data`, the calibration rows (the default), `identity` or `random` ids."""
    recovery: str = "refit"
    recover: str = "after"
    """When the recovery happens: `before` the choice of units, `after` it, or `both`."""
    ridge: float = 0.3
    """Pull of the refit toward the old weights, relative to each input's energy."""
    level1: int = 8
    """Steps by which `refit` fits level 1 of the feed-forward along; 0 leaves it."""
    intercept: bool = False
    """Fit a level-2 bias even where the architecture stores none."""
    calibration: str = "wikitext2"
    samples: int = 128
    fits: int = 2
    """Fits of the recovery, which are averaged. Each takes rows of its own beside the samples, as many as these; with
    0 there is one fit, to the samples alone."""
    more: str = REWRITTEN
    """Where these rows come from: `rewritten`, the samples with half of their tokens drawn anew by the dense model, or
    `self`, what it writes from nothing, whole in memory."""
    length: int = 128
    refit_calibration: str | None = None
    """What the recovery is fitted to, where that is not the calibration's text."""
    refit_samples: int | None = None
    """Rows of its own for the recovery; it takes those of the calibration where neither is given."""
    temperature: float = 1.0
    """At which the model writes, where the source is `self`."""
    seed: int = 0
    multiple: int = 1
    """Feed-forward widths are rounded to it (`--round`)."""
    dtype: str | None = None
    """Of the output; that of the input by default."""
    format: str | None = None
    """`hf`, a width per block; `stock`, one width and the stock class; `gguf`. By default the first that holds it."""
    type: str = "f16"
    """Of the tensors in a GGUF file."""

    def __post_init__(self) -> None:
        share = self.sparsity
        if share is not None and not (isinstance(share, int | float) and math.isfinite(share) and 0 < share < 1):
            raise SecateurError(f"sparsity is {share}; it must lie between 0 and 1, for example 0.25")
        self._check_target()
        for name, value, allowed in (
            ("of", self.of, SHARES),
            ("format", self.format, (None, *FORMATS)),
            ("sigma", self.sigma, (None, *SIGMAS)),
            ("recovery", self.recovery, RECOVERIES),
            ("recover", self.recover, WHEN),
            ("dtype", self.dtype, (None, *DTYPES)),
            ("more", self.more, MORE),
        ):
            if value not in allowed:
                choices = ", ".join(str(choice) for choice in allowed if choice)
                raise SecateurError(f"{name} is '{value}'; it must be one of {choices}")
        if self.type != Options.type and self.format != "gguf":
            raise SecateurError(f"type {self.type} is of a GGUF file: add --format gguf, or leave --type out")
        wrong = [kind for kind in self.modules if kind not in get_args(Kind)]
        if wrong or not self.modules or len(set(self.modules)) < len(self.modules):
            raise SecateurError(f"modules is '{','.join(self.modules)}'; give heads, channels or heads,channels")
        self._check_similarity()
        if not 0 <= self.ridge <= MOST_RIDGE:
            raise SecateurError(f"ridge is {self.ridge}; it must lie between 0 and {MOST_RIDGE:,}, for example 0.3")
        for name, number, least in (
            ("samples", self.samples, 1),
            ("fits", self.fits, 0),
            ("level1", self.level1, 0),
            ("length", self.length, 2),
            ("refit-samples", 1 if self.refit_samples is None else self.refit_samples, 1),
            ("round", self.multiple, 1),
        ):
            if number < least:
                raise SecateurError(f"{name} is {number}; it must be at least {least}")
        if self.fits > MOST_FITS:
            raise SecateurError(f"fits is {self.fits}; it must be at most {MOST_FITS}, each of which takes its time")
        if not 0 <= self.seed < 2**32:
            raise SecateurError(f"seed is {self.seed}; it must lie between 0 and {2**32 - 1}")
        if self.blocks is not None and re.fullmatch("[0-9]*:[0-9]*", self.blocks) is None:
            raise SecateurError(f"blocks is '{self.blocks}'; write first:end, for example 4:30")
        if self.intercept and self.recovery in ("bias", "none"):
            raise SecateurError("an intercept is part of the refit: leave --intercept out, or use --recovery refit")
        if self.recover != "after" and self.recovery in ("bias", "none"):
            raise SecateurError(
                f"with --recovery {self.recovery} no weights are fitted: leave --recover out, or use --recovery refit"
            )
        if self.sigma is not None and not self.choice.uses(("second-moment",)):
            raise SecateurError(f"sigma is part of second-moment, not of {self.criterion}: leave one of them out")
        if self.own_refit_rows and self.recovery == "none":
            raise SecateurError(
                "with --recovery none nothing is fitted: leave --refit-samples and --refit-calibration out"
            )
        if not 0.01 <= self.temperature <= 100:
            raise SecateurError(f"temperature is {self.temperature}; it must lie between 0.01 and 100")
        if self.temperature != 1 and not self.writes:
            raise SecateurError(
                "temperature is for what the model writes: add --more self or --calibration self, or leave it out"
            )

    def _check_target(self) -> None:
        """One thing alone may say how much goes."""
        said = {
            "--sparsity": self.sparsity,
            "--target": self.target,
            "--plan": self.plan,
            "--widths with a file": None if self.widths in WIDTHS else self.widths,
        }
        names = [name for name, value in said.items() if value is not None]
        if len(names) > 1:
            raise SecateurError(f"{names[0]} and {names[1]} both say how much goes; leave one of them out")
        if self.plan is not None and self.widths != Options.widths:
            raise SecateurError(f"--plan and --widths {self.widths} both say how much goes; leave one of them out")
        if self.gives_widths:
            # A plan says where to cut, and exactly; ratios say where.
            where = {"--modules": self.modules != KINDS, "--blocks": self.blocks, "--round": self.multiple != 1}
            both = [name for name, value in where.items() if value and not (name == "--round" and self.plan is None)]
            if both:
                raise SecateurError(f"{both[0]} and {names[0]} both say what goes; leave one of them out")
        for name, path in (("plan", self.plan), ("widths", self.widths)):
            if path is not None and path not in WIDTHS and not Path(path).is_file():
                known = " (or adaptive, uniform)" if name == "widths" else ""
                raise SecateurError(f"{name} is '{path}', where there is no file{known}")
        if self.target is not None:
            parse_target(self.target)
        if self.format == "stock" and self.widths == "adaptive" and self.plan is None:
            raise SecateurError(
                "the stock format holds one width for all blocks: take --widths uniform, or --format hf"
            )

    def _check_similarity(self) -> None:
        """Similarity needs a threshold, which may be all that says how many heads go."""
        choice = self.choice
        if not choice.similar:
            if self.tau is not None:
                raise SecateurError("tau is about similar heads: leave --tau out, or take --criterion similarity")
            return
        if self.tau is None:
            raise SecateurError("similarity needs a threshold: add --tau 0.19, or --tau auto with a --sparsity")
        if self.tau == "auto":
            if self.sparsity is None:
                raise SecateurError("tau auto needs a --sparsity: the share of the attention's parameters to remove")
        elif not 0 < self.threshold <= LARGEST:
            raise SecateurError(
                f"tau is {self.tau}; it must be above 0 and at most ln 2 = {LARGEST:.4f}, for example 0.19, or auto"
            )
        if "heads" not in self.modules:
            raise SecateurError("similarity is between heads: add heads to --modules, or take another criterion")
        if not choice.settles:
            return
        if choice.alone and self.tau != "auto" and (self.sparsity is not None or self.target is not None):
            said = "--sparsity" if self.sparsity is not None else "--target"
            raise SecateurError(f"--tau and {said} both say how much goes; leave one of them out, or take --tau auto")
        if self.gives_widths:
            said = "--plan" if self.plan is not None else "--widths with a file"
            raise SecateurError(f"--tau and {said} both say how many heads go; leave one of them out")
        if self.widths == "uniform" or self.format == "stock":
            raise SecateurError(
                "similarity finds as many heads to remove as there are in each block, which the stock format and "
                "--widths uniform do not hold: leave them out and take --format hf, or --criterion similarity+surgeon"
            )
        if not choice.alone and "channels" not in self.modules:
            raise SecateurError("channels have a criterion, but --modules leaves them out; take --criterion similarity")
        if not choice.alone and self.searches:
            raise SecateurError(
                "a target of perplexity varies the heads too, whose number tau decides: take --criterion "
                "similarity+surgeon, or another target"
            )

    @property
    def choice(self) -> Choice:
        """The criterion of each kind of unit."""
        return parse_choice(self.criterion)

    @property
    def threshold(self) -> float:
        """`tau` as a number; NaN where it is none."""
        try:
            return float(self.tau or "nan")
        except ValueError:
            return math.nan

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Which units may go, as far as a criterion for them is there."""
        return self.modules if self.choice.channels is not None else ("heads",)

    @property
    def own_refit_rows(self) -> bool:
        """The recovery is fitted to other rows than those by which units are chosen."""
        return self.refit_samples is not None or self.refit_calibration is not None

    @property
    def sources(self) -> tuple[str, str]:
        """Where the rows for the choice of units, and those for the recovery, come from."""
        return self.calibration, self.refit_calibration or self.calibration

    @property
    def fits_more(self) -> int:
        """Fits that take rows of their own beside the samples."""
        return self.fits if self.recovery == "refit" else 0

    @property
    def writes(self) -> bool:
        """The model writes rows token by token, for which all of it must be in memory."""
        return SELF in self.sources or (self.more == SELF and self.fits_more > 0)

    @property
    def scores(self) -> str:
        """The criterion by its name among those that can be computed."""
        return self.criterion.replace("second-moment", IDENTITY) if self.sigma == "identity" else self.criterion

    @property
    def adds_biases(self) -> bool:
        """Level-2 layers get a bias, also where the architecture has none."""
        return self.intercept or self.recovery == "bias"

    @property
    def gives_widths(self) -> bool:
        """A file says how wide each block is to be."""
        return self.plan is not None or self.widths not in WIDTHS

    @property
    def searches(self) -> bool:
        """The target is a perplexity: the size that meets it is found by pruning."""
        return isinstance(self.goal, Target) and self.goal.quantity == "ppl"

    @property
    def goal(self) -> float | Target:
        """What to reach."""
        return parse_target(self.target) if self.target is not None else (self.sparsity or 0.25)

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
