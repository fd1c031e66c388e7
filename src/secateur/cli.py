"""The command line: thin typer commands over the library, one line for every mistake."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import click
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from secateur import __version__
from secateur.errors import SecateurError
from secateur.options import Options
from secateur.structure import Kind

T = TypeVar("T")

app = typer.Typer(
    name="secateur",
    help="Prune a pretrained language model in one shot: fewer attention heads, narrower feed-forward layers, "
    "an ordinary checkpoint out. No retraining, no backward pass, one block in memory at a time.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
log = Console(stderr=True, highlight=False)


class Bars:
    """Progress bars with time left, on standard error."""

    def track(self, items: Iterable[T], what: str) -> Iterator[T]:
        """Draw one bar for a loop."""
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=log, transient=False) as progress:
            yield from progress.track(items, description=what)

    def note(self, text: str) -> None:
        """Print one line about a choice."""
        log.print(text)


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Top level: only `--version`."""
    if version:
        typer.echo(f"secateur {__version__}")
        raise typer.Exit


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, a hub id (owner/name), or a .gguf file.")],
    out: Annotated[Path, typer.Argument(help="Folder to write. It appears complete or not at all.")],
    sparsity: Annotated[float, typer.Option(help="Share of parameters to remove, between 0 and 1.")] = 0.25,
    of: Annotated[
        str, typer.Option(help="What the share counts: the pruned 'blocks', or the whole 'model'.")
    ] = "blocks",
    blocks: Annotated[str | None, typer.Option(help="Blocks to prune, first:end, such as 4:30. Default: all.")] = None,
    modules: Annotated[str, typer.Option(help="What may go: heads, channels, or both.")] = "heads,channels",
    widths: Annotated[str, typer.Option(help="'uniform': one width for all blocks; loads everywhere.")] = "uniform",
    criterion: Annotated[
        str, typer.Option(help="Which units go: surgeon, second-moment, wanda, l1, l2 or random.")
    ] = "surgeon",
    recovery: Annotated[
        str,
        typer.Option(help="'refit': level 2 to an error-aware target; 'paper': both levels to dense outputs; 'none'."),
    ] = "refit",
    recover: Annotated[str, typer.Option(help="When: 'before' units are chosen, 'after', or 'both'.")] = "after",
    ridge: Annotated[float, typer.Option(help="Pull of the refit toward the old weights.")] = Options.ridge,
    intercept: Annotated[
        bool, typer.Option("--intercept", help="Also fit level-2 biases that the model does not have yet.")
    ] = False,
    calibration: Annotated[
        str,
        typer.Option(help="Text: a .txt or .jsonl file, - for standard input, a data set's name, or 'random' ids."),
    ] = "wikitext2",
    samples: Annotated[int, typer.Option(help="Calibration rows.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens in each row.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the choice of rows, and of the criterion 'random'.")] = 0,
    round_: Annotated[
        int,
        typer.Option("--round", help="Round feed-forward widths to multiples: 32 for CPUs, 64 or 128 for GPUs."),
    ] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="Of the output: float32, bfloat16, float16. Default: as the input.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the checkpoint's own code run.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes, memory and time expected, and stop.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder at OUT.")] = False,
) -> None:
    """Prune MODEL and write a smaller ordinary checkpoint to OUT.

    Example: secateur prune ./SmolLM2-135M ./SmolLM2-pruned --sparsity 0.25 --calibration text.txt
    """
    options = Options(
        sparsity=sparsity,
        of=of,
        blocks=blocks,
        modules=cast("tuple[Kind, ...]", tuple(part.strip() for part in modules.split(",") if part.strip())),
        widths=widths,
        criterion=criterion,
        recovery=recovery,
        recover=recover,
        ridge=ridge,
        intercept=intercept,
        calibration=calibration,
        samples=samples,
        length=length,
        seed=seed,
        multiple=round_,
        dtype=dtype,
    )
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
        watcher=Bars(),
    )
    Console(highlight=False).print(prune_table(summary, None if dry_run else out))


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, a hub id, or a .gguf file.")],
    perplexity: Annotated[
        list[str] | None,
        typer.Option(help="Text to score: a .txt or .jsonl file, or a data set's name. May be repeated."),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens in each row.")] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens to use from the start of each text; 0 for all.")] = 8192,
    speed: Annotated[bool, typer.Option("--speed", help="Measure tokens/s of prefill and decoding.")] = False,
    against: Annotated[str | None, typer.Option(help="A dense model to print beside, with ratios.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="To compute in: float32, bfloat16 or float16.")] = "float32",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the checkpoint's own code run.")
    ] = False,
) -> None:
    """Measure MODEL: perplexity of texts, and speed; with --against, side by side with another model.

    Example: secateur eval ./SmolLM2-pruned --perplexity wiki.txt --against ./SmolLM2-135M --speed
    """
    from secateur.evaluate.compare import evaluate as run
    from secateur.report.tables import eval_table

    result = run(
        model,
        against=against,
        texts=perplexity or [],
        length=length,
        tokens=tokens or None,
        speed=speed,
        device=device,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        watcher=Bars(),
        check=lambda: _writable(json_),
    )
    if json_ is not None:
        json_.write_text(json.dumps(result.as_dict(), indent=2) + "\n", encoding="utf-8")
    Console(highlight=False).print(eval_table(result))


def _writable(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise SecateurError(f"{path}: cannot be written; its folder must exist and it must not be a folder itself")


def main() -> None:
    """Run the command line; mistakes are one line on standard error and exit code 2."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.ERROR)
    # A polite kill cleans up as Ctrl-C does.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code: Any = app(standalone_mode=False)
    except SecateurError as error:
        _fail(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        typer.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message())
    except (click.exceptions.Abort, KeyboardInterrupt):
        log.print("interrupted: nothing was written")
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
