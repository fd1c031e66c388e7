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
        "Fraction of the blocks' parameters to remove, between 0 and 1, or a percentage such as 25%. The result is "
        "within 0.5 percentage points of it, or the command says why not.",
        default_text="0.25",
        percent=True,
    )
    target: str | None = option(
        None,
        TARGET,
        "Limit on the size or the cost of the result, used instead of --sparsity. params=100M or params=80%: "
        "parameters; active=80%: parameters active per token; bytes=60MB: size of the weights; kv=50%: size of the KV "
        "cache; prefill=1.5x or decode=1.5x: speed-up over MODEL, measured on this machine; ppl=1.2x: perplexity at "
        "most 1.2 times that of MODEL (secateur prune only).",
        default_text="none",
    )
    plan: str | None = option(
        None,
        TARGET,
        "JSON file with the width of every block, used instead of --sparsity: the output of secateur plan, or the "
        "secateur.json of an earlier run, which also lists the heads and channels to keep.",
        default_text="none",
        may_name_file=True,
    )
    widths: str = option(
        "adaptive",
        TARGET,
        "How widths vary between blocks. adaptive: modules get the widths that together raise the loss of the model "
        "least (AL-AM in the paper); uniform: all blocks have the same width, as the standard transformers class "
        'needs; or a JSON file with the fraction to remove from ranges of blocks (ML-MM), such as {"4:20": 0.2, '
        '"20:30": {"heads": 0, "channels": 0.4}}. The file {"0:32": 0.25} removes the same fraction everywhere '
        "(UL-UM).",
        may_name_file=True,
    )
    blocks: str | None = option(
        None,
        TARGET,
        "Range of blocks to prune, as first:end without the end: 4:30 prunes blocks 4 to 29.",
        default_text="all blocks",
    )
    modules: tuple[str, ...] = option(
        KINDS,
        TARGET,
        "Kinds of units that may be removed, separated by commas: heads, channels (including those of experts) and "
        "experts.",
    )
    round: int | None = option(
        None,
        TARGET,
        "Round the feed-forward widths that change to multiples of this number. Kernels are slow unless widths are "
        "multiples of 16, GGUF stores weights in groups of 32, and some GPUs prefer 64 or 128.",
        default_text="32 for widths of at least 1,024 channels, otherwise 1",
        minimum=1,
    )
    criterion: str = option(
        "surgeon",
        METHOD,
        "How to choose the units to remove. surgeon: units whose output the remaining ones reproduce best; "
        "second-moment (the paper's), wanda (Wanda-sp), flap-wifv, flap-ifv, flap-wifn: units with the lowest score "
        "by activations; l1, l2: by the norm of their weights; llm-pruner-vector, llm-pruner-element1, "
        "llm-pruner-element2: by gradients; random: at random. heads=X,channels=Y uses X for heads and Y for channels.",
    )
    recovery: str = option(
        "refit",
        METHOD,
        "How the remaining weights compensate for removed units. refit: fit the output projections to the activations "
        "of the original model, which also corrects the errors of earlier blocks; bias: keep the weights and add the "
        "mean output of the removed units as a bias, as FLAP does; none: only cut the weights.",
        choices=(*NAMES, *recovery_modules()),
        fit_only=True,
    )
    effort: str = option(
        "normal",
        METHOD,
        "Time spent on --recovery refit. quick: fit the output projections once, to the calibration rows; normal: fit "
        "them to the calibration rows and as many resampled rows (rows in which the model has drawn half of the "
        "tokens anew), and fit the up and gate projections too; best: average two fits of the kind normal.",
        choices=tuple(EFFORTS),
        fit_only=True,
    )
    ridge: float = option(
        0.3,
        METHOD,
        "Strength of the penalty that keeps fitted weights close to the original ones, for --recovery refit and for "
        "the errors in a survey. A smaller value follows the calibration text more closely.",
    )
    calibration: str = option(
        GENERAL,
        CALIBRATION,
        "Text to run through the model. general: a mix of texts that comes with secateur; general+TEXT: half of the "
        "rows from that mix, half from TEXT; or TEXT alone. TEXT is a .txt file, a .jsonl file with the key text or "
        "messages, - for standard input, or a data set (wikitext2, c4, ptb, bookcorpus or name:config:column). "
        "Without any text: self (MODEL writes the text itself, and must fit into memory whole) or random (random "
        "token ids).",
        may_name_file=True,
    )
    samples: int = option(128, CALIBRATION, "Number of calibration rows, drawn from the text at random.", minimum=1)
    length: int = option(128, CALIBRATION, "Tokens in each calibration row.", minimum=2)
    seed: int = option(0, CALIBRATION, "Random seed for the calibration rows and for --criterion random.")
    format: str | None = option(
        None,
        OUTPUT,
        f"Format of the pruned model. {'; '.join(f'{one.name}: {one.help}' for one in FORMATS.values())}.",
        default_text=f"{default_format(False).name}; {default_format(True).name} with --widths uniform",
        choices=tuple(FORMATS),
    )
    type: str = option(
        "f16",
        OUTPUT,
        "Data type of the tensors "
        + "; ".join(f"with --format {one.name}: {', '.join(one.types)}" for one in FORMATS.values() if one.types)
        + ".",
    )
    dtype: str | None = option(
        None,
        OUTPUT,
        "Data type of the weights in a folder: float32, bfloat16 or float16.",
        default_text="as in MODEL; bfloat16 if MODEL is a .gguf file",
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
        "File for the survey of MODEL, which holds the error of every module at every width. It is read if it exists, "
        "and written otherwise. One survey serves all sparsities.",
        default_text="none",
    )
    dry_run: bool = option(False, OUTPUT, "Print the expected sizes, memory and time, and write nothing.")
    overwrite: bool = option(False, OUTPUT, "Replace an output that already exists.")
    restart: bool = option(
        False,
        OUTPUT,
        "Start from the beginning. Without this option, the same command resumes a run that was stopped.",
    )
    push_to_hub: str | None = option(
        None,
        OUTPUT,
        "Upload OUT to this repository of the Hugging Face Hub, owner/name. A new repository is private.",
        default_text="none",
    )
    device: str = option(
        "auto",
        COMPUTING,
        "Device to compute on: auto (a CUDA GPU if there is one, otherwise the CPU), cpu, cuda or cuda:1.",
    )
    memory: str | None = option(
        None,
        COMPUTING,
        "Upper bound on the memory of this process, such as 8GB, or 50% of the free memory. Activations that do not "
        "fit are kept in files.",
        default_text="half of the free memory",
    )
    revision: str | None = option(
        None, COMPUTING, "Branch, tag or commit of MODEL, if MODEL is a hub id.", default_text="the main branch"
    )
    family: Path | None = option(
        None,
        COMPUTING,
        "YAML file that describes the model family of MODEL, if secateur families does not list it; see "
        "docs/extend.md.",
        default_text="none",
    )
    trust_remote_code: bool = option(
        False, COMPUTING, "Run Python code that comes with MODEL, for models that transformers does not include."
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
