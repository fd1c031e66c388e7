"""`python -m paper [MODEL]... RECIPE --out DIR`: run a recipe, and write tables and plots of the scores.

If a model has the name of a model in the paper (arXiv 2407.19126), the table also shows the published numbers. DIR
keeps scores, surveys and generated texts, but no pruned models. The same command skips finished runs.

Example: python -m paper ./SmolLM2-135M table2 --out table2 --calibration a.txt --perplexity b.txt
"""

import argparse
import contextlib
import io
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paper.recipe import changed, read_recipe, recipe_names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code. An error is one line on standard error and exit code 2."""
    given = parser().parse_args(arguments)
    errors = sys.stderr
    from secateur import SecateurError

    try:
        with contextlib.redirect_stderr(io.StringIO()) if given.quiet else contextlib.nullcontext():
            _run(given)
    except SecateurError as error:
        if given.verbose:
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=errors)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: finished runs are in {given.out}; run the same command to resume", file=errors)
        return 130
    return 0


def _run(given: argparse.Namespace) -> None:
    """Execute the recipe, and print its table."""
    *models, name = given.what
    recipe = changed(
        read_recipe(name),
        **{name: getattr(given, name) for name in ("calibration", "perplexity", "limit", "tokens", "length", "blocks")},
        **{name: getattr(given, name) for name in ("samples", "refit_samples", "seeds")},
        tasks=None if given.tasks is None else [task for task in given.tasks if task != "none"],
    )
    # Not at the top: the help does not wait for torch.
    from rich.console import Console

    from paper.compare import compare
    from paper.dense import compare_dense
    from paper.plots import plot_comparison
    from paper.tables import terminal_table, write_tables
    from secateur import Bars, RunOptions, SecateurError

    if given.json and given.json != "-" and Path(given.json).exists() and not given.overwrite:
        raise SecateurError(f"{given.json} exists; add --overwrite, or name another file")
    run_options = RunOptions(device=given.device, trust_remote_code=given.trust_remote_code)
    watcher, console = Bars(), Console(highlight=False, markup=False)
    shown: list[Any] = []
    failed: list[str] = []
    if recipe.kind != "grid":
        files = compare_dense(recipe, models, given.out, run_options=run_options, watcher=watcher)
        shown = [f"{', '.join(files)} are in {given.out}"]
    else:
        found = compare(
            recipe,
            models,
            given.out,
            run_options=run_options,
            task_path=given.task_path,
            watcher=watcher,
            done=lambda part: write_tables(part, given.out),
        )
        plot_comparison(found, given.out)
        table, notes = terminal_table(found)
        shown = [table, *notes, f"table.md, table.csv, table.json and plots are in {given.out}"]
        failed = found.failed
    contents = (given.out / "table.json").read_text()
    if given.json == "-":
        print(contents, end="")
    else:
        if given.json:
            Path(given.json).write_text(contents)
        for part in shown:
            console.print(part, soft_wrap=isinstance(part, str))
    if failed:
        raise SecateurError(f"{len(failed)} of {found.planned} runs failed; the first: {failed[0]}")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    as_written = argparse.RawTextHelpFormatter
    usage = "python -m paper [MODEL]... RECIPE --out DIR [options]"
    result = argparse.ArgumentParser(usage=usage, description=__doc__, formatter_class=as_written)
    recipes = ", ".join(recipe_names())
    result.add_argument(
        "what",
        nargs="+",
        metavar="RECIPE",
        help=f"a .yaml file, or one of {recipes};\nmodels before it replace those that the recipe names",
    )
    result.add_argument("--out", required=True, type=Path, help="folder for tables, plots and finished runs")
    result.add_argument("--task-path", type=Path, help="folder with your own task files (.yaml) in lm-eval's format")
    result.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    result.add_argument("--trust-remote-code", action="store_true", help="run Python code from the model's folder")
    result.add_argument("--json", help="write table.json to this file too; with -, print it instead of the table")
    result.add_argument("--overwrite", action="store_true", help="replace the file of --json")
    result.add_argument("--quiet", action="store_true", help="print no progress and no notes, only the result")
    result.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    replaced = result.add_argument_group("replace settings of the recipe")
    replaced.add_argument("--calibration", help="calibrate on this text; runs that use random or self stay")
    replaced.add_argument(
        "--perplexity", action="append", help="score this text, TEXT or COLUMN=TEXT; may be given several times"
    )
    replaced.add_argument("--tasks", type=_names, help="lm-eval tasks, TASK or COLUMN=TASK with commas; or none")
    replaced.add_argument("--limit", type=int, help="items to score, from the start of each task; 0 for all")
    replaced.add_argument("--tokens", type=int, help="tokens to score of each text; 0 for all")
    replaced.add_argument("--samples", type=_numbers, help="calibration rows; several if the recipe varies them")
    replaced.add_argument(
        "--refit-samples", type=_numbers, help="rows for retraining, and for the recovery where it has its own"
    )
    replaced.add_argument("--length", type=int, help="tokens in each row, for calibration and for scoring")
    replaced.add_argument("--blocks", help="range of blocks to prune, such as 4:30")
    replaced.add_argument("--seeds", type=_numbers, help="random seeds with commas; runs are repeated with each")
    return result


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
