"""Every option of `prune` and the related commands, each declared once: name, type, default, help and check.

The command line, the Python signature, recipes and the record in secateur.json all follow from these fields. `Options`
decide the result; `RunOptions` do not change it.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from secateur.base.errors import SecateurError
from secateur.base.names import FORMATS, RECOVERIES, Declaration
from secateur.base.options import check_types, cli_name, given_or_made, option, option_specs
from secateur.base.words import DTYPES
from secateur.criteria.choice import EXPERTS, IDENTITY, Choice, parse_choice
from secateur.model.kinds import KINDS
from secateur.plan.target import Target, parse_target
from secateur.text.sources import GENERAL
from secateur.vocabulary.wanted import ALL, parse_vocabulary

if TYPE_CHECKING:
    from secateur.fit.recovery import Recovery

TARGET, METHOD, CALIBRATION, OUTPUT, COMPUTING = "Target", "Method", "Calibration", "Output", "Computing"
PAPER = "The paper's variants"
"""Panels of the help, one for each group of options."""
WIDTHS = ("adaptive", "uniform")
"""Values of `--widths` that are not file names; the default comes first."""
MAX_RIDGE = 1_000_000
"""Ridge at which the refit no longer moves a weight; float32 overflows only far beyond."""
LARGEST_TAU = math.log(2)
"""Largest value of `--tau`: the Jensen-Shannon divergence of two distributions that share nothing, in nats."""
UPPER_BOUNDS: dict[str, tuple[int, str]] = {"ridge": (MAX_RIDGE, ", for example 0.3"), "seed": (2**32 - 1, "")}
"""Largest value of options that start at 0, and the end of the error message."""


Rules = Iterator[tuple[object, str]]
"""Rules of options: whether each is broken, and the error message."""


class Effort(NamedTuple):
    """Meaning of a value of `--effort`."""

    fits: int
    """Number of fits whose weights are averaged."""
    input_steps: int
    """Gauss-Newton steps that fit the up and gate projections of each feed-forward."""
    resample: bool = True
    """Whether each fit also gets resampled rows of its own."""


EFFORTS = {"quick": Effort(1, 0, resample=False), "normal": Effort(1, 2), "best": Effort(2, 2)}


@dataclass(frozen=True)
class Options:
    """Options that decide the result of `prune` for a given model.

    Raises `SecateurError` for a value that is wrong for every model.
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
        "most 1.2 times that of MODEL (secateur prune only). Percentages refer to MODEL before --vocabulary removes "
        "tokens.",
        default_text="none",
    )
    plan: str | None = option(
        None,
        TARGET,
        "JSON file with the width of every block, used instead of --sparsity: the output of secateur plan, or the "
        "secateur.json of an earlier run, which also lists the heads and channels to keep.",
        default_text="none",
    )
    widths: str = option(
        WIDTHS[0],
        TARGET,
        "How widths vary between blocks. adaptive: each module gets its own width, such that the loss of the whole "
        "model rises least; uniform: all blocks have the same widths, as the standard transformers class needs; or "
        "(not in secateur sizes) a JSON file with the fraction of units to remove from ranges of blocks, such as "
        '{"4:20": 0.2, "20:30": {"heads": 0, "channels": 0.4}}.',
    )
    blocks: str | None = option(
        None,
        TARGET,
        "Range of blocks that may be pruned, written first:end. The end is not included: 4:30 means blocks 4 to 29.",
        default_text="all blocks",
    )
    modules: tuple[str, ...] = option(
        KINDS,
        TARGET,
        "Kinds of units that may be removed, separated by commas: heads, channels (including those of experts) and "
        "experts.",
    )
    vocabulary: str = option(
        ALL,
        TARGET,
        "Tokens to keep. all: every token; latin or latin+cyrillic: the tokens of these Unicode scripts, and digits, "
        "punctuation and symbols; text: the tokens that occur in the calibration text; text:5: those that occur at "
        "least five times; 64k or 50%: this number or share of the tokens, where tokens of the calibration text's "
        "scripts come before others, and frequent ones before rare ones. Special tokens and bytes are always kept.",
    )
    round: int | None = option(
        None,
        TARGET,
        "Channel counts of pruned modules are multiples of this number. Kernels are slow unless channel counts are "
        "multiples of 16, GGUF stores weights in groups of 32, and some GPUs are fastest with multiples of 64 or 128.",
        default_text="256 if the output has blocks of 256 weights and all dense numbers are multiples of 256; else 32 "
        "if every feed-forward has at least 1,024 channels and every expert 256; else 1, for experts 8",
        minimum=1,
    )
    criterion: str = option(
        "surgeon",
        METHOD,
        "How to choose the units to remove. surgeon: the units whose output the remaining units reproduce best. Other "
        "criteria give each unit a score and remove those with the lowest scores. second-moment (of the paper, arXiv "
        "2407.19126), wanda (Wanda-sp), flap-wifv, flap-ifv, flap-wifn: scores from activations; l1, l2: from weights; "
        "llm-pruner-vector, llm-pruner-element1, llm-pruner-element2: from gradients; random: random scores. "
        "heads=X,channels=Y uses X "
        f"for heads and Y for channels; experts=Z uses Z for experts, where Z is {', '.join(EXPERTS[:-1])} or "
        f"{EXPERTS[-1]}. similarity (Algorithm 2 of the paper; not in secateur survey): heads with nearly the same "
        "attention weights as another head; similarity+X: such heads first, then units by X.",
        default_text="surgeon; for experts, reroute",
    )
    recovery: str = option(
        "refit",
        METHOD,
        "How the remaining weights compensate for removed units. refit: fit the output projections to the activations "
        "of the original model, which also corrects the errors of earlier blocks; bias: keep the weights and add the "
        "mean output of the removed units as a bias, as FLAP does; none: only cut the weights. paper "
        "(Algorithms 1, 3 and 4 of the paper): fit the input projections and the output projection of each module to "
        "their outputs in the original model.",
        choices=tuple(RECOVERIES),
    )
    effort: str = option(
        "normal",
        METHOD,
        "Time spent on --recovery refit. quick: fit the output projections once, to the calibration rows; normal: fit "
        "them to the calibration rows and to a copy of each row in which the model has replaced half of the tokens, "
        "and fit the up and gate projections too; best: make two such fits and average their weights.",
        choices=tuple(EFFORTS),
        fit_only=True,
    )
    ridge: float = option(
        0.3,
        METHOD,
        "Strength of the penalty that keeps fitted weights close to the original ones, for the refit and for the "
        "errors in a survey. A smaller value follows the calibration text more closely.",
    )
    calibration: str = option(
        GENERAL,
        CALIBRATION,
        "Calibration text, on which activations are measured and tokens are counted. general: a mix of texts that "
        "comes with secateur; general+TEXT: half of the rows from that mix, half from TEXT; or TEXT alone. TEXT is a "
        ".txt file, a .jsonl file with the key text or messages, - for standard input, or a data set (wikitext2, c4, "
        "ptb, bookcorpus or name:config:column). Without any text: self (MODEL generates the text; the whole model "
        "must fit into memory) or random (random token ids).",
    )
    samples: int = option(128, CALIBRATION, "Number of calibration rows, drawn from the text at random.", minimum=1)
    length: int = option(128, CALIBRATION, "Tokens in each calibration row.", minimum=2)
    seed: int = option(0, CALIBRATION, "Random seed for the calibration rows and for --criterion random.")
    format: str | None = option(
        None,
        OUTPUT,
        f"Format of the pruned model. {'; '.join(f'{one.name}: {one.help}' for one in FORMATS.values())}.",
        default_text="hf; stock with --widths uniform",
        choices=tuple(FORMATS),
    )
    type: str = option(
        "f16",
        OUTPUT,
        "Data type of the tensors "
        + "; ".join(f"with --format {one.name}: {', '.join(one.types)}" for one in FORMATS.values() if one.types)
        + ", or q2_k to q6_k, q4_k_m, iq3_xxs and others that llama.cpp's library makes (the package's extra llama). "
        "as-input: the type that a tensor has in MODEL, a .gguf file.",
    )
    dtype: str | None = option(
        None,
        OUTPUT,
        "Data type of the weights in a folder: float32, bfloat16 or float16.",
        default_text="as in MODEL; bfloat16 if MODEL is a .gguf file",
        choices=DTYPES,
    )
    tau: float | None = option(
        None,
        PAPER,
        "Threshold of --criterion similarity, in nats, for example 0.19: two heads are similar if the Jensen-Shannon "
        "divergence of their attention weights is below it.",
        default_text="none",
    )
    sigma: str | None = option(
        None,
        PAPER,
        "Covariance of the inputs that --criterion second-moment uses. data: of the calibration rows; identity: the "
        "identity matrix; random: of random token ids.",
        default_text="data",
        choices=("data", "identity", "random"),
    )
    recover: str = option(
        "after",
        PAPER,
        "The time at which --recovery paper fits the weights. after: after the units to remove are chosen; before: "
        "before they are chosen; both: at both times.",
        choices=("after", "before", "both"),
        fit_only=True,
    )
    refit_calibration: str | None = option(
        None,
        PAPER,
        "Text that only the recovery uses, named as in --calibration. Units are then chosen on --calibration, and "
        "weights are fitted on this text.",
        default_text="the text of --calibration",
        fit_only=True,
    )
    refit_samples: int | None = option(
        None,
        PAPER,
        "Number of rows that only the recovery uses. Units are then chosen on other rows, whose number is --samples.",
        default_text="the rows that units are chosen on",
        minimum=1,
        fit_only=True,
    )

    def __post_init__(self) -> None:
        check_types(self)
        for rules in (self._value_rules, self._target_rules, self._output_rules, self._criterion_rules):
            for is_broken, problem in rules():
                if is_broken:
                    raise SecateurError(problem)

    def _value_rules(self) -> Rules:
        """Yield rules for each option alone."""
        share = self.sparsity
        in_range = share is None or 0 < share < 1
        yield not in_range, f"sparsity is {share}; it must lie between 0 and 1, for example 0.25 for 25 %"
        for name, one in option_specs(Options).items():
            if (value := getattr(self, name)) is not None:
                is_choice = not one.choices or value in one.choices
                yield not is_choice, f"{name} is '{value}'; it must be one of {', '.join(one.choices)}"
                is_enough = one.minimum is None or value >= one.minimum
                yield not is_enough, f"{cli_name(name)} is {value}; it must be at least {one.minimum}"
        for name, (most, example) in UPPER_BOUNDS.items():
            value = getattr(self, name)
            yield not 0 <= value <= most, f"{name} is {value}; it must lie between 0 and {most:,}{example}"
        is_known = 0 < len(self.modules) == len(set(self.modules) & set(KINDS))
        yield not is_known, f"modules is '{','.join(self.modules)}'; give one or more of {', '.join(KINDS)}"
        is_range = self.blocks is None or re.fullmatch("[0-9]{0,18}:[0-9]{0,18}", self.blocks)
        yield not is_range, f"blocks is '{self.blocks}'; write first:end, for example 4:30"
        if self.target is not None:
            parse_target(self.target)
        parse_vocabulary(self.vocabulary)

    def _target_rules(self) -> Rules:
        """Yield rules by which one option alone sets how much to remove, and its file exists."""
        # A plan has a width for every block, so that no value of --widths goes with it.
        no_file = WIDTHS if self.plan is None else WIDTHS[:1]
        amounts = {
            "--tau": self.tau if self.parsed_criterion.only_compares_heads else None,
            "--sparsity": self.sparsity,
            "--target": self.target,
            "--plan": self.plan,
            f"--widths {self.widths}": None if self.widths in no_file else self.widths,
        }
        given = [name for name, value in amounts.items() if value is not None]
        yield len(given) > 1, f"{' and '.join(given[:2])} both set how much to remove; leave one of them out"
        # The shares of a --widths file are rounded, the widths of a --plan file are not.
        places = {"--modules": self.modules != KINDS, "--blocks": self.blocks, "--round": self.plan and self.round}
        for name, value in places.items() if self.widths_from_file else ():
            yield value, f"{name} and {given[0]} both set what to remove from which blocks; leave one of them out"
        has_plan = self.plan is None or Path(self.plan).is_file()
        yield not has_plan, f"plan is '{self.plan}', but there is no such file; check the path"
        has_widths = self.widths in WIDTHS or Path(self.widths).is_file()
        advice = "check the path, or write adaptive or uniform"
        yield not has_widths, f"widths is '{self.widths}', but there is no such file; {advice}"

    def _output_rules(self) -> Rules:
        """Yield rules by which the output format has types of tensors if --type is given, and holds different widths if
        the run makes them."""
        has_type = self.type == Options.type or self.output_format.types
        typed = " or ".join(f"--format {one.name}" for one in FORMATS.values() if one.types)
        yield not has_type, f"type {self.type} is only for {typed}: add that, or leave --type out"
        is_varied = self.widths == "adaptive" and self.plan is None
        yield (
            is_varied and self.output_format.uniform,
            f"the {self.format} format holds one width for all blocks: use --widths uniform, or --format hf",
        )

    def _criterion_rules(self) -> Rules:
        """Yield rules by which options of one criterion or one recovery are given together with it."""
        choice, tau = self.parsed_criterion, self.tau
        if choice.compares_heads:
            yield tau is None, "similarity needs a threshold: add --tau, for example 0.19"
            is_threshold = tau is not None and 0 < tau <= LARGEST_TAU
            most = f"above 0 and at most ln 2 = {LARGEST_TAU:.4f}, for example 0.19"
            yield not is_threshold, f"tau is {tau}; it must be {most}"
            advice = "add heads to --modules, or choose another criterion"
            yield "heads" not in self.modules, f"similarity compares heads: {advice}"
        else:
            yield tau is not None, "tau is an option of --criterion similarity: add that, or leave --tau out"
        is_uniform = self.widths == "uniform" or self.output_format.uniform
        yield (
            choice.only_compares_heads and is_uniform,
            "similarity may remove more heads from one block than from another, but the stock format and --widths "
            "uniform need equal numbers: use --format hf without --widths uniform, or --criterion similarity+surgeon",
        )
        is_used = self.recover == Options.recover or self.recovery == "paper"
        yield not is_used, "recover is an option of --recovery paper: leave --recover out, or add --recovery paper"
        is_used = self.sigma is None or choice.uses("second-moment")
        place = f"--criterion second-moment, not of {self.criterion}"
        yield not is_used, f"sigma is an option of {place}: leave --sigma out"
        is_unused = self.refit_rows is not None and self.recovery == "none"
        yield is_unused, "--recovery none fits nothing: leave --refit-samples and --refit-calibration out"

    @property
    def output_format(self) -> Declaration:
        """The output format."""
        uniform = self.widths == "uniform" and self.plan is None
        return FORMATS[self.format or ("stock" if uniform else "hf")]

    @property
    def torch_dtype(self) -> Any:
        """The dtype of `--dtype`; None for the checkpoint's."""
        # Imported here, so that --help does not wait for torch.
        import torch

        return getattr(torch, self.dtype) if self.dtype else None

    @property
    def parsed_criterion(self) -> Choice:
        """The criterion of each kind of unit."""
        return parse_choice(self.criterion)

    @property
    def criterion_name(self) -> str:
        """The value of `--criterion`, with the name under which the variant that `--sigma` chooses is registered."""
        return self.criterion.replace("second-moment", IDENTITY) if self.sigma == "identity" else self.criterion

    @property
    def prunable_kinds(self) -> tuple[str, ...]:
        """The kinds of units that may be removed and that the criterion can order."""
        return self.modules if self.parsed_criterion.channels is not None else ("heads",)

    @property
    def sources(self) -> tuple[str, str]:
        """The text on which units are chosen, and the text that weights are fitted to."""
        return self.calibration, self.refit_calibration or self.calibration

    @property
    def refit_rows(self) -> int | None:
        """Number of separate rows for the fit; None if weights are fitted to the rows on which units are chosen."""
        separate = self.refit_samples is not None or self.refit_calibration is not None
        return (self.refit_samples or self.samples) if separate else None

    @property
    def chooses_on_random_ids(self) -> bool:
        """Whether units are chosen on random token ids, whatever the calibration."""
        return self.sigma == "random"

    @property
    def separate_choice(self) -> bool:
        """Whether units are chosen on other rows than the weights are fitted to."""
        return self.refit_rows is not None or self.chooses_on_random_ids

    @property
    def resampled_fits(self) -> int:
        """Number of fits that get resampled rows of their own."""
        effort = EFFORTS[self.effort]
        return effort.fits if self.recovery_settings.uses_effort and effort.resample else 0

    @property
    def input_steps(self) -> int:
        """Gauss-Newton steps that fit the up and gate projections of each feed-forward."""
        return EFFORTS[self.effort].input_steps

    @property
    def survey_key(self) -> dict[str, Any]:
        """The part of the options that a survey depends on."""
        random = self.chooses_on_random_ids
        criterion = f"{self.criterion_name} of random ids" if random else self.criterion_name
        key = {"criterion": criterion, "ridge": self.ridge}
        key |= {} if self.vocabulary == ALL else {"vocabulary": self.vocabulary}
        key |= {"seed": self.seed} if random or self.parsed_criterion.uses("random") else {}
        return key | ({"tau": self.tau} if self.parsed_criterion.compares_heads else {})

    @property
    def recovery_settings(self) -> "Recovery":
        """The recovery with its settings."""
        # Imported here, so that --help does not wait for torch.
        from secateur.fit.recovery import all_recoveries

        return all_recoveries()[self.recovery].of(self)

    @property
    def adds_biases(self) -> bool:
        """Whether output projections get a bias even if the architecture has none."""
        return self.recovery_settings.biases == "added"

    @property
    def widths_from_file(self) -> bool:
        """Whether a file sets the width of each block."""
        return self.plan is not None or self.widths not in WIDTHS

    @property
    def targets_perplexity(self) -> bool:
        """Whether the target is a perplexity, so that models of several sizes are pruned and measured."""
        return isinstance(self.size_target, Target) and self.size_target.quantity == "ppl"

    @property
    def size_target(self) -> float | Target:
        """The share of the parameters to remove, or the target."""
        return parse_target(self.target) if self.target is not None else (self.sparsity or 0.25)

    def block_range(self, count: int) -> range:
        """Return the blocks to prune of a model with `count` blocks.

        Raises:
            SecateurError: The range is empty, or goes beyond the last block.
        """
        if self.blocks is None:
            return range(count)
        first, _, last = self.blocks.partition(":")
        start, stop = int(first or 0), int(last or count)
        if stop > count or start >= count:
            raise SecateurError(f"blocks is '{self.blocks}', but the model has {count} blocks (0:{count})")
        if start >= stop:
            raise SecateurError(f"blocks is '{self.blocks}', which is empty or reversed; the end must be larger")
        return range(start, stop)


@dataclass(frozen=True)
class RunOptions:
    """Options that do not change the result: files, the device, memory, and where the model comes from."""

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
    overwrite: bool = option(False, OUTPUT, "Replace the output and the file of --json if secateur wrote them.")
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
        "Device to compute on: auto (a CUDA GPU if there is one, otherwise the CPU), cpu, cuda, cuda:1, mps or another "
        "device of torch.",
    )
    memory: str | None = option(
        None,
        COMPUTING,
        "Upper bound on the memory of this process: an amount such as 8GB, or a share of the free memory such as 50%. "
        "What does not fit is kept in files.",
        default_text="half of the free memory",
    )
    revision: str | None = option(
        None, COMPUTING, "Branch, tag or commit of MODEL, if MODEL is a hub id.", default_text="the main branch"
    )
    family: Path | None = option(
        None,
        COMPUTING,
        "YAML file that corrects what is read off the class of MODEL, or describes its blocks; see docs/extend.md.",
        default_text="none",
    )
    trust_remote_code: bool = option(
        False,
        COMPUTING,
        "Run Python code from the model's folder, for models that transformers does not include.",
    )


SURVEYED = ("vocabulary", "blocks", "modules", "criterion", "ridge", "calibration", "samples", "length", "seed")
"""Options that a survey depends on."""


def with_settings(
    options: Options | None, run_options: RunOptions | None, settings: dict[str, Any]
) -> tuple[Options, RunOptions]:
    """Return `Options` and `RunOptions`, each as given or else made of the settings that are its fields.

    Raises:
        TypeError: A setting is a field of neither, or is given together with the object that has this field, or an
            object has another type.
    """
    names, run_names = option_specs(Options), option_specs(RunOptions)
    if unknown := sorted(set(settings) - set(names) - set(run_names)):
        raise TypeError(f"no option {unknown[0]!r}; the options are {', '.join([*names, *run_names])}")
    own = {name: value for name, value in settings.items() if name in names}
    others = {name: value for name, value in settings.items() if name not in own}
    example = "sparsity=0.25"
    return given_or_made(Options, options, own, example), given_or_made(RunOptions, run_options, others, example)
