"""The command line: thin typer commands over the library, one line for every mistake."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from secateur import __version__
from secateur.errors import SecateurError
from secateur.options import Options
from secateur.recipes import recipe_names
from secateur.structure import Kind

if TYPE_CHECKING:
    from rich.table import Table

T = TypeVar("T")

app = typer.Typer(
    name="secateur",
    help="Prune a pretrained language model in one shot: fewer attention heads, narrower feed-forward layers, "
    "an ordinary checkpoint out. No retraining, no backward pass, one block in memory at a time.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
log = Console(stderr=True, highlight=False, markup=False)

# Newer typers carry a click of their own; its base class of mistakes is reached through what both export.
_Mistake: type[Exception] = typer.BadParameter.__mro__[2]

_INTERRUPTED = 130
"""The exit code of shells for Ctrl-C."""


class Bars:
    """Progress bars with time left, on standard error."""

    def track(self, items: Iterable[T], what: str) -> Iterator[T]:
        """Draw one bar for a loop."""
        columns = (
            TextColumn("{task.description:<10}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=log, transient=False) as progress:
            yield from progress.track(items, description=what)

    def note(self, text: str) -> None:
        """Print one line about a choice."""
        log.print(text, soft_wrap=True)

    def busy(self, what: str) -> AbstractContextManager[Any]:
        """Turn a spinner, on a terminal only."""
        return log.status(f"{what} ...")


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Top level: only `--version`."""
    if version:
        typer.echo(f"secateur {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


_Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A Hugging Face folder, a hub id (owner/name), or a .gguf file.", show_default=False
    ),
]
_Device = Annotated[
    str,
    typer.Option(
        help="Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:1, mps.", rich_help_panel="Computing"
    ),
]
_Revision = Annotated[
    str | None,
    typer.Option(
        help="Branch, tag or commit of a hub id.", show_default="the main branch", rich_help_panel="Computing"
    ),
]
_Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Let code that comes with the checkpoint run, where transformers does not know the model.",
        rich_help_panel="Computing",
    ),
]


_Sparsity = Annotated[
    float | None,
    typer.Option(
        help="Share of the parameters to remove, between 0 and 1.", show_default="0.25", rich_help_panel="Target"
    ),
]
_Target = Annotated[
    str | None,
    typer.Option(
        help="In place of a share, the most that the result may take: params=100M, params=80%, bytes=60MB, kv=50%, "
        "prefill=1.5x or decode=1.5x (as fast, on this machine), ppl=1.2x (the smallest model within that loss).",
        show_default="none",
        rich_help_panel="Target",
    ),
]
_Of = Annotated[
    str,
    typer.Option(help="What that share counts: the pruned blocks, or the whole model.", rich_help_panel="Target"),
]
_Blocks = Annotated[
    str | None,
    typer.Option(
        help="Blocks to prune, first:end with the end left out, such as 4:30.",
        show_default="all",
        rich_help_panel="Target",
    ),
]
_Modules = Annotated[
    str,
    typer.Option(
        help="What may go: heads, channels, or both.",
        rich_help_panel="Target",
    ),
]
_Widths = Annotated[
    str,
    typer.Option(
        help="adaptive: each module the width at which the whole model loses least; uniform: one width for all "
        "blocks, which the stock class holds; or a JSON file with the share that goes for ranges of blocks, like "
        '{"4:20": 0.2, "20:30": {"heads": 0, "channels": 0.4}}.',
        rich_help_panel="Target",
    ),
]
_Round = Annotated[
    int,
    typer.Option(
        "--round",
        help="Feed-forward widths are multiples of this, for fast kernels: 32 on CPUs, 64 or 128 on GPUs.",
        rich_help_panel="Target",
    ),
]
_Criterion = Annotated[
    str,
    typer.Option(
        help="Which units go. surgeon: those that the others replace best (most accurate, slowest); "
        "second-moment, wanda, flap-wifv, flap-ifv, flap-wifn: by activations; llm-pruner-vector, "
        "llm-pruner-element1, llm-pruner-element2: by gradients; l1, l2: by weights alone; random; "
        "similarity: heads that attend like another one; similarity+X: these first, the rest by X; or a pair, "
        "heads=X,channels=Y.",
        rich_help_panel="Method",
    ),
]
_Tau = Annotated[
    str | None,
    typer.Option(
        help="With similarity: heads whose attention differs by less are similar, in nats of Jensen-Shannon divergence "
        "(0.19, say); auto: the threshold at which the share --sparsity of the attention goes.",
        show_default="none",
        rich_help_panel="Method",
    ),
]
_Sigma = Annotated[
    str | None,
    typer.Option(
        help="What second-moment takes for the covariance of a module's inputs: data, that of the calibration; "
        "identity; or random, that of random token ids.",
        show_default="data",
        rich_help_panel="Method",
    ),
]
_Ridge = Annotated[
    float,
    typer.Option(
        help="Pull of the refit toward the old weights; less follows the calibration text more closely.",
        rich_help_panel="Method",
    ),
]
_Calibration = Annotated[
    str,
    typer.Option(
        help="Text that shows what the model does: a .txt file, a .jsonl file with the key text or messages, "
        "- for standard input, a data set (wikitext2, c4, ptb, bookcorpus or name:config:column), or without any data: "
        "self, what the model itself writes, or random token ids.",
        rich_help_panel="Calibration",
    ),
]
_Samples = Annotated[int, typer.Option(help="Rows drawn from it at random.", rich_help_panel="Calibration")]
_Rewrites = Annotated[
    int,
    typer.Option(
        help="For the refit, add so many copies of the rows in which the model writes half of the tokens anew.",
        rich_help_panel="Calibration",
    ),
]
_Length = Annotated[int, typer.Option(help="Tokens in each row.", rich_help_panel="Calibration")]
_Temperature = Annotated[
    float,
    typer.Option(help="At which the model writes, with --calibration self.", rich_help_panel="Calibration"),
]
_SaveCalibration = Annotated[
    Path | None,
    typer.Option(
        help="Keep what the model writes in this new .jsonl file; --calibration FILE reads the same rows back.",
        show_default="none",
        rich_help_panel="Calibration",
    ),
]
_Seed = Annotated[int, typer.Option(help="Decides the rows, and the criterion random.", rich_help_panel="Calibration")]
_Dtype = Annotated[
    str | None,
    typer.Option(
        help="Of the weights written: float32, bfloat16 or float16.",
        show_default="as in MODEL; bfloat16 from .gguf",
        rich_help_panel="Output",
    ),
]
_Type = Annotated[
    str,
    typer.Option("--type", help="Of the tensors in a GGUF file: f32, f16, bf16, q8_0, q4_0.", rich_help_panel="Output"),
]
_Survey = Annotated[
    Path | None,
    typer.Option(
        help="Keep the survey in this file: read if it is there, written otherwise. One survey serves every size.",
        show_default="none",
        rich_help_panel="Output",
    ),
]
_Format = Annotated[
    str | None,
    typer.Option(
        help="hf: a width for each block, transformers loads it with trust_remote_code=True; stock: one width, the "
        "family's own class; gguf: one file for llama.cpp.",
        show_default="hf; stock with --widths uniform",
        rich_help_panel="Output",
    ),
]


@app.command(no_args_is_help=False)
def prune(
    model: _Model,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="The folder or .gguf file to write; it appears whole or not at all.",
            show_default=False,
        ),
    ],
    sparsity: _Sparsity = None,
    target: _Target = None,
    plan: Annotated[
        str | None,
        typer.Option(
            help="In place of both, a file with each block's width, as secateur plan writes it, or with the exact "
            "heads and channels to keep, as in the secateur.json of an earlier run.",
            show_default="none",
            rich_help_panel="Target",
        ),
    ] = None,
    of: _Of = Options.of,
    blocks: _Blocks = None,
    modules: _Modules = "heads,channels",
    widths: _Widths = Options.widths,
    round_: _Round = Options.multiple,
    criterion: _Criterion = Options.criterion,
    tau: _Tau = None,
    sigma: _Sigma = None,
    recovery: Annotated[
        str,
        typer.Option(
            help="How the rest makes up for them. refit: the output layers, aiming at what the dense model gives "
            "and so repairing earlier blocks' errors; paper: both layers of a module, to their dense outputs; "
            "bias: no weight changes, but what the removed units gave on average is added; none: weights are only cut.",
            rich_help_panel="Method",
        ),
    ] = Options.recovery,
    recover: Annotated[
        str,
        typer.Option(help="When that happens: before units are chosen, after, or both.", rich_help_panel="Method"),
    ] = Options.recover,
    ridge: _Ridge = Options.ridge,
    intercept: Annotated[
        bool,
        typer.Option(
            "--intercept",
            help="Fit a bias in output layers that have none; only --format hf holds it where the family's own class "
            "has no such biases (Llama, Mistral, Qwen, Gemma, ...). Biases that exist are always fitted.",
            rich_help_panel="Method",
        ),
    ] = False,
    calibration: _Calibration = Options.calibration,
    samples: _Samples = Options.samples,
    rewrites: _Rewrites = Options.rewrites,
    length: _Length = Options.length,
    temperature: _Temperature = Options.temperature,
    save_calibration: _SaveCalibration = None,
    refit_calibration: Annotated[
        str | None,
        typer.Option(
            help="Text of its own for the recovery, like --calibration: that one decides what goes, this one what the "
            "rest is fitted to.",
            show_default="that of --calibration",
            rich_help_panel="Calibration",
        ),
    ] = None,
    refit_samples: Annotated[
        int | None,
        typer.Option(
            help="Rows of its own for the recovery; those of --samples then only decide what goes.",
            show_default="the same rows for both",
            rich_help_panel="Calibration",
        ),
    ] = None,
    seed: _Seed = Options.seed,
    device: _Device = "auto",
    revision: _Revision = None,
    trust_remote_code: _Trust = False,
    dtype: _Dtype = None,
    format: _Format = None,
    type_: _Type = Options.type,
    survey: _Survey = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print sizes, memory and time to expect, and write nothing.", rich_help_panel="Output"
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace OUT where it is a model folder already.", rich_help_panel="Output"),
    ] = False,
) -> None:
    """Prune MODEL and write a smaller checkpoint to OUT.

    Example: secateur prune ./SmolLM2-135M ./SmolLM2-pruned --sparsity 0.25 --calibration text.txt
    """
    options = Options(
        sparsity=sparsity,
        target=target,
        plan=plan,
        of=of,
        blocks=blocks,
        modules=_kinds(modules),
        widths=widths,
        criterion=criterion,
        tau=tau,
        sigma=sigma,
        recovery=recovery,
        recover=recover,
        ridge=ridge,
        intercept=intercept,
        calibration=calibration,
        samples=samples,
        rewrites=rewrites,
        length=length,
        temperature=temperature,
        refit_calibration=refit_calibration,
        refit_samples=refit_samples,
        seed=seed,
        multiple=round_,
        dtype=dtype,
        format=format,
        type=type_,
    )
    if survey is not None and not survey.exists():
        _check_file(survey)
    bars = Bars()
    with bars.busy("Loading torch and transformers"):
        from secateur.report.tables import prune_table
        from secateur.steps.prune import prune as run

    summary = run(
        model,
        out,
        options=options,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        dry_run=dry_run,
        overwrite=overwrite,
        survey_file=survey,
        save_calibration=save_calibration,
        watcher=bars,
    )
    _show(*prune_table(summary, out))


@app.command()
def export(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that secateur prune wrote.", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="The folder, or the .gguf file, to write.", show_default=False),
    ],
    format: Annotated[
        str,
        typer.Option(help="gguf: one file for llama.cpp; hf: a folder whose config spells every block's width."),
    ] = "gguf",
    type_: Annotated[str, typer.Option("--type", help="Of the tensors in a GGUF file: f32, f16, bf16, q8_0, q4_0.")] = (
        Options.type
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT.")] = False,
) -> None:
    """Convert a pruned model in DIR to another format.

    Example: secateur export ./SmolLM2-pruned SmolLM2-pruned.gguf --type q8_0
    """
    if format not in ("gguf", "hf"):
        raise SecateurError(f"format is '{format}'; it must be gguf or hf")
    bars = Bars()
    with bars.busy("Loading torch and transformers"):
        from secateur.steps.export import export as run

    done = run(folder, out, format=cast("Any", format), type=type_, overwrite=overwrite, watcher=bars)
    typer.echo(f"{done.bytes / 1e6:,.2f} MB of weights, computed by {done.architecture}. Written to {done.path}")


@app.command()
def retrain(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that secateur prune wrote.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    calibration: Annotated[str, typer.Option(help="Text to train on; see secateur prune.")] = Options.calibration,
    samples: Annotated[int, typer.Option(help="Rows drawn from it at random.")] = 1024,
    length: Annotated[int, typer.Option(help="Tokens in each row.")] = 128,
    epochs: Annotated[int, typer.Option(help="Passes over the rows.")] = 2,
    batch: Annotated[int, typer.Option(help="Rows in a step.")] = 16,
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="At the start; it falls to zero.")] = 1e-4,
    seed: Annotated[int, typer.Option(help="Decides the rows, their order and the adapters' start.")] = 0,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one) or cpu.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT where it is a model folder.")] = False,
) -> None:
    """Retrain a pruned model in DIR with LoRA, merged into the weights. Needs the extra `lora`.

    Example: secateur retrain ./SmolLM2-pruned ./SmolLM2-retrained --calibration text.txt
    """
    bars = Bars()
    with bars.busy("Loading torch and transformers"):
        from secateur.steps.retrain import retrain as run
        from secateur.training import Training

    training = Training(
        calibration=calibration,
        samples=samples,
        length=length,
        epochs=epochs,
        batch=batch,
        rank=rank,
        learning_rate=learning_rate,
        seed=seed,
    )
    done = run(folder, out, training, device=device, overwrite=overwrite, watcher=bars)
    before, after = done.perplexity
    typer.echo(f"Perplexity on rows not trained on: {before:.3f} before, {after:.3f} after. Written to {done.path}")


@app.command()
def plan(
    model: _Model,
    sparsity: _Sparsity = None,
    target: _Target = None,
    plan_: Annotated[
        str | None,
        typer.Option("--plan", help="Check and draw this plan in place of making one.", rich_help_panel="Target"),
    ] = None,
    of: _Of = Options.of,
    blocks: _Blocks = None,
    modules: _Modules = "heads,channels",
    widths: _Widths = Options.widths,
    round_: _Round = Options.multiple,
    criterion: _Criterion = Options.criterion,
    tau: _Tau = None,
    sigma: _Sigma = None,
    ridge: _Ridge = Options.ridge,
    calibration: _Calibration = Options.calibration,
    samples: _Samples = Options.samples,
    length: _Length = Options.length,
    temperature: _Temperature = Options.temperature,
    save_calibration: _SaveCalibration = None,
    seed: _Seed = Options.seed,
    device: _Device = "auto",
    revision: _Revision = None,
    trust_remote_code: _Trust = False,
    format: _Format = None,
    type_: _Type = Options.type,
    survey: _Survey = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the plan to this JSON file: edit it, then give it to secateur prune --plan.",
            show_default="none",
            rich_help_panel="Output",
        ),
    ] = None,
) -> None:
    """Choose widths for MODEL, or check a plan, and show them block by block; no model is written.

    Example: secateur plan ./SmolLM2-135M --target params=100M --calibration text.txt --out plan.json
    """
    options = Options(
        sparsity=sparsity,
        target=target,
        plan=plan_,
        of=of,
        blocks=blocks,
        modules=_kinds(modules),
        widths=widths,
        criterion=criterion,
        tau=tau,
        sigma=sigma,
        ridge=ridge,
        calibration=calibration,
        samples=samples,
        length=length,
        temperature=temperature,
        seed=seed,
        multiple=round_,
        format=format,
        type=type_,
    )
    for file in (out, survey):
        if file is not None and not (file == survey and file.exists()):
            _check_file(file)
    bars = Bars()
    with bars.busy("Loading torch and transformers"):
        from secateur.report.tables import plan_table
        from secateur.steps.propose import propose

    proposal = propose(
        model,
        options,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        survey_file=survey,
        save_calibration=save_calibration,
        watcher=bars,
    )
    if out is not None:
        out.write_text(json.dumps(proposal.as_dict(), indent=2) + "\n", encoding="utf-8")
    _show(*plan_table(proposal, out))


@app.command()
def survey(
    model: _Model,
    out: Annotated[
        Path, typer.Option(help="The folder to write; it appears whole or not at all.", rich_help_panel="Output")
    ] = Path("survey"),
    blocks: _Blocks = None,
    modules: _Modules = "heads,channels",
    criterion: _Criterion = Options.criterion,
    ridge: _Ridge = Options.ridge,
    calibration: _Calibration = Options.calibration,
    samples: _Samples = Options.samples,
    length: _Length = Options.length,
    seed: _Seed = Options.seed,
    device: _Device = "auto",
    revision: _Revision = None,
    trust_remote_code: _Trust = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a survey that is there.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Measure what each module of MODEL costs at each width: survey.json for prune, and survey.html to look at.

    Example: secateur survey ./SmolLM2-135M --out survey --calibration text.txt
    """
    options = Options(
        blocks=blocks,
        modules=_kinds(modules),
        criterion=criterion,
        ridge=ridge,
        calibration=calibration,
        samples=samples,
        length=length,
        seed=seed,
    )
    bars = Bars()
    with bars.busy("Loading torch and transformers"):
        from secateur.report.tables import survey_table
        from secateur.steps.survey_page import survey_page

    found = survey_page(
        model,
        out,
        options,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        watcher=bars,
    )
    _show(*survey_table(found, out))


@app.command()
def sizes(
    model: _Model,
    out: Annotated[
        Path, typer.Option(help="The folder that gets a model for each size, a table and a plot.", show_default=False)
    ],
    sparsities: Annotated[
        str, typer.Option(help="Shares of the parameters to remove, with commas.", rich_help_panel="Target")
    ] = "0.1,0.2,0.3,0.5",
    of: _Of = Options.of,
    widths: _Widths = Options.widths,
    round_: _Round = Options.multiple,
    calibration: _Calibration = Options.calibration,
    samples: _Samples = Options.samples,
    rewrites: _Rewrites = Options.rewrites,
    length: _Length = Options.length,
    temperature: _Temperature = Options.temperature,
    seed: _Seed = Options.seed,
    perplexity: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to score each size on; may be given several times.",
            show_default="none",
            rich_help_panel="What to measure",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(help="Tokens of each text; 0 for all.", rich_help_panel="What to measure")
    ] = 8192,
    device: _Device = "auto",
    revision: _Revision = None,
    trust_remote_code: _Trust = False,
    format: Annotated[
        str | None, typer.Option(help="hf or stock; see secateur prune.", rich_help_panel="Output")
    ] = None,
    dtype: _Dtype = None,
    survey: _Survey = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace models that are there.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Prune MODEL to several sizes from one survey, and plot perplexity against size.

    Example: secateur sizes ./SmolLM2-135M --out sizes --sparsities .1,.25,.5 --calibration a.txt --perplexity b.txt
    """
    shares = _shares(sparsities)
    if format == "gguf":
        raise SecateurError("sizes writes folders; take --format hf, then secateur export each")
    options = [
        Options(
            sparsity=share,
            of=of,
            widths=widths,
            multiple=round_,
            calibration=calibration,
            samples=samples,
            rewrites=rewrites,
            length=length,
            temperature=temperature,
            seed=seed,
            format=format,
            dtype=dtype,
        )
        for share in shares
    ]
    bars = Bars()
    with bars.busy("Loading torch and transformers"):
        from secateur.report.tables import sizes_table
        from secateur.steps.sizes import sizes as run

    results = run(
        model,
        out,
        options,
        texts=perplexity or [],
        tokens=tokens or None,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        survey_file=survey,
        overwrite=overwrite,
        watcher=bars,
    )
    _show(*sizes_table(results, out))


@app.command(name="eval")
def evaluate(
    model: _Model,
    against: Annotated[
        str | None,
        typer.Option(
            help="A second model, usually the dense one, printed beside with the ratio of MODEL to it.",
            show_default="none",
            rich_help_panel="What to measure",
        ),
    ] = None,
    perplexity: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to score: a .txt or .jsonl file, - for standard input, or a data set (wikitext2, c4, ptb or "
            "name:config:column). May be given several times.",
            show_default="none",
            rich_help_panel="What to measure",
        ),
    ] = None,
    length: Annotated[
        int, typer.Option(help="Tokens in each row; rows are scored alone.", rich_help_panel="What to measure")
    ] = 128,
    tokens: Annotated[
        int,
        typer.Option(help="Tokens to use from the start of each text; 0 for all.", rich_help_panel="What to measure"),
    ] = 8192,
    tasks: Annotated[
        str,
        typer.Option(
            help="Multiple-choice tasks of lm-eval to answer zero-shot, such as boolq,piqa,hellaswag,winogrande,"
            "arc_easy,arc_challenge,openbookqa. Needs secateur\\[tasks]; the data come from the hub.",
            show_default="none",
            rich_help_panel="What to measure",
        ),
    ] = "",
    limit: Annotated[
        int,
        typer.Option(help="Items from the start of each task; 0 for all.", rich_help_panel="What to measure"),
    ] = 0,
    task_path: Annotated[
        Path | None,
        typer.Option(
            help="A folder with task files (.yaml) of your own, in lm-eval's form, which can read local data.",
            show_default="none",
            rich_help_panel="What to measure",
        ),
    ] = None,
    speed: Annotated[
        bool,
        typer.Option(
            "--speed",
            help="Measure tokens/s of prefill and decoding; two models take turns, so that a busy machine does not "
            "spoil their ratio.",
            rich_help_panel="What to measure",
        ),
    ] = False,
    device: _Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="To compute in: float32, bfloat16 or float16.", rich_help_panel="Computing")
    ] = "float32",
    revision: _Revision = None,
    trust_remote_code: _Trust = False,
    json_: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Also write the figures to this file.", show_default="none", rich_help_panel="Output"
        ),
    ] = None,
) -> None:
    """Measure MODEL: size, perplexity of texts, accuracy on tasks, speed; --against puts another beside it.

    Example: secateur eval ./SmolLM2-pruned --perplexity wiki.txt --against ./SmolLM2-135M --speed
    """
    if tokens < 0:
        raise SecateurError(f"tokens is {tokens}; it must be positive, or 0 for the whole text")
    if limit < 0:
        raise SecateurError(f"limit is {limit}; it must be positive, or 0 for all items")
    if json_ is not None:
        _check_file(json_)
    bars = Bars()
    with bars.busy("Loading torch and transformers"):
        from secateur.evaluate.compare import evaluate as run
        from secateur.report.tables import eval_table

    result = run(
        model,
        against=against,
        texts=perplexity or [],
        length=length,
        tokens=tokens or None,
        tasks=[task.strip() for task in tasks.split(",") if task.strip()],
        limit=limit or None,
        task_path=task_path,
        speed=speed,
        device=device,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        watcher=bars,
    )
    if json_ is not None:
        json_.write_text(json.dumps(result.as_dict(), indent=2) + "\n", encoding="utf-8")
    _show(*eval_table(result))


@app.command()
def compare(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL]... RECIPE",
            help="A recipe: a .yaml file, or by name one that comes with secateur: " + ", ".join(recipe_names()) + ". "
            "In front of it the models to run it on, by default the recipe's own.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="The folder for tables and plots. Finished runs stay in it: the same command goes on from there.",
            show_default=False,
        ),
    ],
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Calibrate on this text, see secateur prune; random ids, and what the model writes, stay.",
            show_default="as in the recipe",
            rich_help_panel="In place of the recipe's",
        ),
    ] = None,
    perplexity: Annotated[
        list[str] | None,
        typer.Option(
            help="Score this text. NAME=TEXT puts it into the column NAME, beside what is published for that. May be "
            "given several times.",
            show_default="as in the recipe",
            rich_help_panel="In place of the recipe's",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Score these tasks of lm-eval, with commas; or NAME=TASK; none for no tasks.",
            show_default="as in the recipe",
            rich_help_panel="In place of the recipe's",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Items from the start of each task; 0 for all.",
            show_default="as in the recipe",
            rich_help_panel="In place of the recipe's",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens to score of each text; 0 for all.",
            show_default="as in the recipe",
            rich_help_panel="In place of the recipe's",
        ),
    ] = None,
    samples: Annotated[
        str | None,
        typer.Option(
            help="Calibration rows; several with commas where the recipe has an axis of them.",
            show_default="as in the recipe",
            rich_help_panel="In place of the recipe's",
        ),
    ] = None,
    refit_samples: Annotated[
        str | None,
        typer.Option(
            help="Rows of its own for the recovery, in runs that have such, and rows to retrain on; several with "
            "commas where the recipe has an axis of them.",
            show_default="as in the recipe",
            rich_help_panel="In place of the recipe's",
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens in each row, of calibration and scoring.",
            show_default="as in the recipe",
            rich_help_panel="In place of the recipe's",
        ),
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(
            help="Blocks to prune, such as 4:30.",
            show_default="as in the recipe",
            rich_help_panel="In place of the recipe's",
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            help="Seeds, with commas; each run is made with every one.",
            show_default="as in the recipe",
            rich_help_panel="In place of the recipe's",
        ),
    ] = None,
    task_path: Annotated[
        Path | None,
        typer.Option(help="A folder with task files (.yaml) of your own, in lm-eval's form.", show_default="none"),
    ] = None,
    device: _Device = "auto",
    trust_remote_code: _Trust = False,
) -> None:
    """Carry out a recipe: prune models in many ways under one protocol, and put the scores into a table and plots.

    Where the model is the paper's, by the name of its folder or hub id, the paper's figures stand beside.

    Only scores are kept. A run that is finished is not made again, however the last command ended.

    Example: secateur compare ./SmolLM2-135M table2 --out table2 --calibration a.txt --perplexity b.txt
    """
    from secateur.recipe import Changes, changed, read_recipe

    *models, name = what
    changes = Changes(
        calibration=calibration,
        perplexity=tuple(perplexity) if perplexity else None,
        tasks=None if tasks is None else _listed("" if tasks == "none" else tasks),
        limit=limit,
        tokens=tokens,
        samples=_whole("samples", samples),
        refit_samples=_whole("refit-samples", refit_samples),
        length=length,
        blocks=blocks,
        seeds=_whole("seeds", seeds),
    )
    recipe = changed(read_recipe(name), changes)
    bars = Bars()
    with bars.busy("Loading torch and transformers"):
        from secateur.report.comparison import compare_table, write_tables
        from secateur.report.comparison_plots import plot_comparison
        from secateur.steps.compare import compare as run
        from secateur.steps.compare_activations import compare_activations
        from secateur.steps.compare_heads import compare_heads

    how: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code, "watcher": bars}
    try:
        if recipe.kind == "activations":
            compare_activations(recipe, models, out, **how)
            typer.echo(f"table.md, table.csv, table.json and activations.png are in {out}")
            return
        if recipe.kind == "graph":
            compare_heads(recipe, models, out, **how)
            typer.echo(f"table.json and graph.png are in {out}")
            return
        found = run(recipe, models, out, task_path=task_path, done=lambda part: write_tables(part, out), **how)
    except KeyboardInterrupt:
        log.print(f"interrupted: finished runs are in {out}; the same command goes on from there")
        sys.exit(_INTERRUPTED)
    plot_comparison(found, out)
    _show(*compare_table(found, out))
    if found.failed:
        raise SecateurError(f"{len(found.failed)} of {found.planned} runs failed; the first, {found.failed[0]}")


def _listed(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _whole(name: str, text: str | None) -> tuple[int, ...] | None:
    """Whole numbers between commas."""
    if text is None:
        return None
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise SecateurError(f"{name} is '{text}'; write whole numbers with commas, for example 0,1,2") from None
    if len(set(numbers)) < len(numbers):
        raise SecateurError(f"{name} is '{text}', where one is there twice")
    return numbers


def _kinds(text: str) -> tuple[Kind, ...]:
    return cast("tuple[Kind, ...]", tuple(part.strip() for part in text.split(",")))


def _shares(text: str) -> list[float]:
    """Numbers between commas."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise SecateurError(f"sparsities is '{text}'; write numbers with commas, for example .1,.25,.5") from None
    if len(set(shares)) < len(shares):
        raise SecateurError(f"sparsities is '{text}', where one is there twice")
    return sorted(shares)


def _check_file(path: Path) -> None:
    """See that a file can be written, before the work."""
    folder = path.absolute().parent
    if path.is_dir():
        raise SecateurError(f"{path}: a folder is there; name a file for the figures")
    if not folder.is_dir():
        raise SecateurError(f"{path}: the folder {folder} does not exist; create it first")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise SecateurError(f"{path}: cannot be written; choose another place")


def _show(table: Table, lines: list[str]) -> None:
    console = Console(highlight=False, markup=False)
    console.print(table)
    for line in lines:
        console.print(line, soft_wrap=True)


def main() -> None:
    """Run the command line; mistakes are one line on standard error and exit code 2."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.ERROR)
    # A polite kill cleans up as Ctrl-C does.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code: Any = app(prog_name="secateur", standalone_mode=False)
    except SecateurError as error:
        _fail(str(error))
    except _Mistake as error:
        where = getattr(getattr(error, "ctx", None), "command_path", "secateur")
        _fail(f"{error.format_message().rstrip('.')}; see {where} --help")  # type: ignore[attr-defined]
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}; check the path and its permissions")
    except (typer.Abort, KeyboardInterrupt):
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        log.print("interrupted: nothing was written")
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
