"""The options of `prune` and its kin, each declared once: name, default, help, panel, check.

The command line, the Python signature, recipes and the record in secateur.json all follow from these fields.
`Options` decide the result; `RunOptions` says where and how a run goes. Plug-ins add options of their own.
"""

import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from secateur.base.errors import SecateurError
from secateur.base.options import OptionSpec, check_types, cli_name, option, option_specs
from secateur.base.plugins import plugins, recovery_modules
from secateur.base.words import DTYPES
from secateur.criteria.choice import Choice, parse_choice
from secateur.fit.recoveries import NAMES
from secateur.formats.registry import FORMATS, Declaration, default_format
from secateur.model.kinds import KINDS
from secateur.plan.target import Target, parse_target
from secateur.text.sources import GENERAL

if TYPE_CHECKING:
    from secateur.fit.recovery import Recovery
    from secateur.plan.preselection import Preselection

TARGET, METHOD, CALIBRATION, OUTPUT = "Target", "Method", "Calibration", "Output"
COMPUTING = "Computing"
WIDTHS = ("adaptive", "uniform")
MAX_RIDGE = 1_000_000
"""There, no weight moves; float32 ends far beyond."""


class Effort(NamedTuple):
    """What an effort stands for."""

    fits: int
    """Fits that are averaged."""
    input_steps: int
    """Steps by which each fits the up and gate layers along with the feed-forward's output layer."""
    resample: bool = True
    """Each fit has rows of its own, made up by the model, beside the text."""


EFFORTS = {"quick": Effort(1, 0, resample=False), "normal": Effort(1, 2), "best": Effort(2, 2)}


@dataclass(frozen=True)
class Options:
    """What decides the result of `prune`, besides the model itself.

    Raises `SecateurError` for a value that makes no sense whatever the model.
    """

    sparsity: float | None = option(
        None,
        TARGET,
        "Share of the parameters to remove, between 0 and 1, or as 25%.",
        default_text="0.25",
        percent=True,
    )
    target: str | None = option(
        None,
        TARGET,
        "The most that the result may take, in place of a share: params=100M, params=80%, bytes=60MB (of its tensors), "
        "active=80% (parameters that a token meets), kv=50%, prefill=1.5x or decode=1.5x (as fast, on this machine), "
        "ppl=1.2x (of prune alone: the smallest model within that loss).",
        default_text="none",
    )
    plan: str | None = option(
        None,
        TARGET,
        "File with each block's width, as secateur plan writes it, or with the exact heads and channels to keep, as in "
        "the secateur.json of an earlier run; in place of a share.",
        default_text="none",
        may_name_file=True,
    )
    widths: str = option(
        "adaptive",
        TARGET,
        "Widths of the blocks. adaptive (the paper's AL-AM): each module has the width at which the whole model loses "
        "least; uniform: all blocks have one width, which the stock class holds; or a JSON file (ML-MM) with the share "
        'that goes for ranges of blocks, like {"4:20": 0.2, "20:30": {"heads": 0, "channels": 0.4}}; {"0:32": 0.25} is '
        "UL-UM, one ratio everywhere.",
        may_name_file=True,
    )
    blocks: str | None = option(
        None, TARGET, "Blocks to prune, first:end with the end left out, such as 4:30.", default_text="all"
    )
    modules: tuple[str, ...] = option(KINDS, TARGET, "Units that may go: heads, channels (of experts, too), experts.")
    round: int | None = option(
        None,
        TARGET,
        "Multiple to which feed-forward widths that are cut are rounded. Kernels are slow at others than 16, and GGUF "
        "stores blocks of 32; some GPUs like 64 or 128.",
        default_text="32 from 1,024 channels on, else 1",
        minimum=1,
    )
    criterion: str = option(
        "surgeon",
        METHOD,
        "Criterion for which units go. surgeon: those that the others replace best; second-moment (the paper's), wanda "
        "(Wanda-sp), flap-wifv, flap-ifv, flap-wifn: by activations; l1, l2: by weights alone; random; "
        "llm-pruner-vector, llm-pruner-element1, llm-pruner-element2: by gradients; or a pair, heads=X,channels=Y.",
    )
    recovery: str = option(
        "refit",
        METHOD,
        "Recovery from what goes. refit: the output layers are fitted to what the dense model gives, so that each also "
        "repairs the errors of earlier blocks; bias (FLAP's): no weight changes, but what the removed units gave on "
        "average is added; none: weights are only cut.",
        choices=(*NAMES, *recovery_modules()),
        fit_only=True,
    )
    effort: str = option(
        "normal",
        METHOD,
        "Time that the refit may take. quick: one fit of the output layers to the text; normal: one to the text and "
        "to as much that the model makes of it, with the up and gate layers fitted along; best: two fits like normal, "
        "averaged.",
        choices=tuple(EFFORTS),
        fit_only=True,
    )
    ridge: float = option(
        0.3, METHOD, "Pull of the refit toward the old weights; less follows the calibration text more closely."
    )
    calibration: str = option(
        GENERAL,
        CALIBRATION,
        "Text that shows what the model does. general: several kinds of text that come with the package; general+TEXT: "
        "half of it own text; or own text alone: a .txt file, a .jsonl file with the key text or messages, - for "
        "standard input, a data set (wikitext2, c4, ptb, bookcorpus or name:config:column); or without any data: self, "
        "what the model itself writes, whole in memory, or random token ids.",
        may_name_file=True,
    )
    samples: int = option(128, CALIBRATION, "Rows drawn from the text at random.", minimum=1)
    length: int = option(128, CALIBRATION, "Tokens in each row.", minimum=2)
    seed: int = option(0, CALIBRATION, "Seed of the rows, and of the criterion random.")
    format: str | None = option(
        None,
        OUTPUT,
        f"Format of OUT. {'; '.join(f'{one.name}: {one.help}' for one in FORMATS.values())}.",
        default_text=f"{default_format(False).name}; {default_format(True).name} with --widths uniform",
        choices=tuple(FORMATS),
    )
    type: str = option(
        "f16",
        OUTPUT,
        "Type of the tensors, where the format has its own. "
        + "; ".join(f"{one.name}: {', '.join(one.types)}" for one in FORMATS.values() if one.types)
        + ".",
    )
    dtype: str | None = option(
        None,
        OUTPUT,
        "Dtype of the weights in a folder: float32, bfloat16 or float16.",
        default_text="as in MODEL; bfloat16 from .gguf",
        choices=DTYPES,
    )

    def __post_init__(self) -> None:
        for name in option_specs(Options):
            # A file may be given as a path.
            if isinstance(value := getattr(self, name), Path):
                object.__setattr__(self, name, str(value))
        check_types(self)
        share = self.sparsity
        if share is not None and not (math.isfinite(share) and 0 < share < 1):
            raise SecateurError(f"sparsity is {share}; it must lie between 0 and 1, for example 0.25")
        for name, one in option_specs(Options).items():
            value = getattr(self, name)
            if value is not None and one.choices and value not in one.choices:
                raise SecateurError(f"{name} is '{value}'; it must be one of {', '.join(one.choices)}")
            if value is not None and one.minimum is not None and value < one.minimum:
                raise SecateurError(f"{cli_name(name)} is {value}; it must be at least {one.minimum}")
        self._check_target()
        if self.type != Options.type and not self.output_format.types:
            typed = " or ".join(f"--format {one.name}" for one in FORMATS.values() if one.types)
            raise SecateurError(f"type {self.type} goes with {typed}: add that, or leave --type out")
        wrong = [kind for kind in self.modules if kind not in KINDS]
        if wrong or not self.modules or len(set(self.modules)) < len(self.modules):
            raise SecateurError(f"modules is '{','.join(self.modules)}'; give one or more of {', '.join(KINDS)}")
        if not 0 <= self.ridge <= MAX_RIDGE:
            raise SecateurError(f"ridge is {self.ridge}; it must lie between 0 and {MAX_RIDGE:,}, for example 0.3")
        if not 0 <= self.seed < 2**32:
            raise SecateurError(f"seed is {self.seed}; it must lie between 0 and {2**32 - 1}")
        if self.blocks is not None and re.fullmatch("[0-9]{0,18}:[0-9]{0,18}", self.blocks) is None:
            raise SecateurError(f"blocks is '{self.blocks}'; write first:end, for example 4:30")

    def _check_target(self) -> None:
        """One option alone says how much goes."""
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
        if self.widths_from_file:
            # A plan says where to cut, and exactly; ratios say where.
            where = {"--modules": self.modules != KINDS, "--blocks": self.blocks, "--round": self.round}
            both = [name for name, value in where.items() if value and not (name == "--round" and self.plan is None)]
            if both:
                raise SecateurError(f"{both[0]} and {names[0]} both say what goes; leave one of them out")
        for name, path in (("plan", self.plan), ("widths", self.widths)):
            if path is not None and path not in WIDTHS and not Path(path).is_file():
                known = " (or adaptive, uniform)" if name == "widths" else ""
                raise SecateurError(f"{name} is '{path}', where there is no file{known}")
        if self.target is not None:
            parse_target(self.target)
        if self.output_format.uniform and self.widths == "adaptive" and self.plan is None:
            raise SecateurError(
                f"the {self.format} format holds one width for all blocks: take --widths uniform, or --format hf"
            )

    @property
    def output_format(self) -> Declaration:
        """The output format."""
        return FORMATS[self.format] if self.format else default_format(self.widths == "uniform" and self.plan is None)

    @property
    def parsed_criterion(self) -> Choice:
        """The criterion of each kind of unit."""
        return parse_choice(self.criterion)

    @property
    def prunable_kinds(self) -> tuple[str, ...]:
        """The units that may go, as far as a criterion for them is there."""
        return self.modules if self.parsed_criterion.channels is not None else ("heads",)

    @property
    def sources(self) -> tuple[str, str]:
        """The sources of the rows for the choice of units, and of those for the recovery."""
        return self.calibration, self.calibration

    @property
    def refit_rows(self) -> int | None:
        """Rows of its own for the recovery; None where units are chosen by the same rows."""
        return None

    @property
    def refit_option(self) -> str:
        """The option that gives the number of rows for the recovery, for advice."""
        return "samples"

    @property
    def resampled_fits(self) -> int:
        """Fits that take rows of their own beside the samples."""
        effort = EFFORTS[self.effort]
        return effort.fits if self.recovery_settings.uses_effort and effort.resample else 0

    @property
    def input_steps(self) -> int:
        """Steps by which level 1 of the feed-forward is fitted along."""
        return EFFORTS[self.effort].input_steps

    @property
    def criterion_name(self) -> str:
        """The criterion by its name among those that can be computed."""
        return self.criterion

    @property
    def chooses_on_random_ids(self) -> bool:
        """Whether units are chosen on random token ids, whatever the calibration."""
        return False

    @property
    def separate_choice(self) -> bool:
        """Whether units are chosen on other rows than the weights are fitted to."""
        return self.refit_rows is not None or self.chooses_on_random_ids

    @property
    def survey_key(self) -> dict[str, Any]:
        """What a survey depends on, as far as options say it."""
        random = self.chooses_on_random_ids
        criterion = f"{self.criterion_name} of random ids" if random else self.criterion_name
        key = {"criterion": criterion, "ridge": self.ridge}
        return key | ({"seed": self.seed} if random or self.parsed_criterion.uses("random") else {})

    @property
    def preselection(self) -> "Preselection | None":
        """The measurement by which some heads leave before all others."""
        return None

    @property
    def recovery_settings(self) -> "Recovery":
        """The recovery with its settings."""
        # Not at the top: the help does not wait for torch.
        from secateur.fit.recovery import all_recoveries

        return all_recoveries()[self.recovery].of(self)

    @property
    def adds_biases(self) -> bool:
        """Level-2 layers get a bias, also where the architecture has none."""
        return self.recovery_settings.biases == "added"

    @property
    def widths_from_file(self) -> bool:
        """A file says how wide each block is to be."""
        return self.plan is not None or self.widths not in WIDTHS

    @property
    def targets_perplexity(self) -> bool:
        """The target is a perplexity: the size that meets it is found by pruning."""
        return isinstance(self.size_target, Target) and self.size_target.quantity == "ppl"

    @property
    def size_target(self) -> float | Target:
        """The share to remove, or the target."""
        return parse_target(self.target) if self.target is not None else (self.sparsity or 0.25)

    def block_range(self, count: int) -> range:
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


def _with_plugins(core: type) -> type:
    """Return the options with those of all plug-ins behind them."""
    how: dict[str, Any] = {"__doc__": core.__doc__, "__module__": core.__module__, "__annotations__": {}}
    for one in fields(core):
        if more := " ".join(plugin.helps[one.name] for plugin in plugins() if one.name in plugin.helps):
            said: OptionSpec = one.metadata["option"]
            how["__annotations__"][one.name] = one.type
            how[one.name] = field(default=one.default, metadata={"option": said._replace(help=f"{said.help} {more}")})
    owners = tuple(plugin.options for plugin in plugins())
    return dataclass(frozen=True)(type(core.__name__, (*owners, core), how))


if not TYPE_CHECKING:
    # What a plug-in declares is for it alone to read: the pipeline knows the fields above.
    Options = _with_plugins(Options)


@dataclass(frozen=True)
class RunOptions:
    """Where and how a run goes; nothing here decides the result."""

    def __post_init__(self) -> None:
        for name in ("survey", "family"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, Path(value))
        check_types(self)

    survey: Path | None = option(
        None,
        OUTPUT,
        "File that keeps the survey: read if it is there, written otherwise. One survey serves every size.",
        default_text="none",
    )
    dry_run: bool = option(False, OUTPUT, "Print sizes, memory and time to expect; OUT is not written.")
    overwrite: bool = option(False, OUTPUT, "Replace what is there already under the name of an output.")
    restart: bool = option(False, OUTPUT, "Begin anew where an earlier run to OUT was stopped; without it, it goes on.")
    push_to_hub: str | None = option(
        None, OUTPUT, "Send OUT to this repository of the hub, owner/name; a new one is private.", default_text="none"
    )
    device: str = option(
        "auto", COMPUTING, "Device to compute on: auto (CUDA if there is any, else the CPU), cpu, cuda, cuda:1."
    )
    memory: str | None = option(
        None,
        COMPUTING,
        "Most that the process may take, 8GB or 50% of what is free; activations beyond it lie in files.",
        default_text="half of what is free",
    )
    revision: str | None = option(
        None, COMPUTING, "Branch, tag or commit of MODEL, where that is a hub id.", default_text="the main branch"
    )
    family: Path | None = option(
        None,
        COMPUTING,
        "YAML file that describes MODEL's family, where secateur families does not print it; see docs/extend.md.",
        default_text="none",
    )
    trust_remote_code: bool = option(
        False, COMPUTING, "Let code that comes with the checkpoint run, where transformers does not know the model."
    )


SURVEYED = ("blocks", "modules", "criterion", "ridge", "calibration", "samples", "length", "seed")
"""Options that a survey depends on."""


def with_settings(
    options: Options | None, run_options: RunOptions | None, settings: dict[str, Any]
) -> tuple[Options, RunOptions]:
    """Options and running as they are given, or made of settings by name.

    Raises:
        TypeError: a name that neither of them has, or one beside the object that holds it.
    """
    if unknown := sorted(set(settings) - set(option_specs(Options)) - set(option_specs(RunOptions))):
        known = ", ".join([*option_specs(Options), *option_specs(RunOptions)])
        raise TypeError(f"no option {unknown[0]!r}; there are {known}")
    own = {name: value for name, value in settings.items() if name in option_specs(Options)}
    others = {name: value for name, value in settings.items() if name not in own}
    for given, beside in ((options, own), (run_options, others)):
        if given is not None and beside:
            raise TypeError(f"{next(iter(beside))} stands beside {type(given).__name__}; put it into that")
    return options or Options(**own), run_options or RunOptions(**others)
