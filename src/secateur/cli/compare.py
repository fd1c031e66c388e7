"""`secateur compare`: run a recipe."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.base.errors import SecateurError
from secateur.cli.bars import Bars
from secateur.cli.generate import Only, expand_options
from secateur.cli.terminal import exit_interrupted, print_result
from secateur.cli.values import parse_integers, parse_list
from secateur.commands.options import RunOptions
from secateur.paper.recipes import recipe_names

_replacement = partial(typer.Option, show_default="as in the recipe", rich_help_panel="Replace settings of the recipe")


@expand_options
def compare(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL]... RECIPE",
            help="The recipe: a .yaml file, or the name of a recipe that comes with secateur ("
            + ", ".join(recipe_names())
            + "). Models before it on the command line replace those that the recipe names.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the tables and plots. It also keeps finished runs, so that the same command resumes.",
            show_default=False,
        ),
    ],
    run_options: Annotated[RunOptions, Only(("device", "trust_remote_code"))],
    calibration: Annotated[
        str | None,
        _replacement(
            help="Calibrate on this text, named as for secateur prune. Runs that use random or self are not changed."
        ),
    ] = None,
    perplexity: Annotated[
        list[str] | None,
        _replacement(
            help="Score this text. NAME=TEXT puts the score into the column NAME, next to published figures of that "
            "name. May be given several times."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        _replacement(help="Score these lm-eval tasks, separated by commas, as TASK or NAME=TASK; none for no tasks."),
    ] = None,
    limit: Annotated[
        int | None, _replacement(help="Number of items to score, from the start of each task; 0 for all.")
    ] = None,
    tokens: Annotated[int | None, _replacement(help="Number of tokens to score of each text; 0 for all.")] = None,
    samples: Annotated[
        str | None,
        _replacement(
            help="Number of calibration rows. If the recipe varies this number: several, separated by commas."
        ),
    ] = None,
    refit_samples: Annotated[
        str | None,
        _replacement(
            help="Number of rows for retraining, and for the recovery in runs where it has rows of its own. "
            "If the recipe varies this number: several, separated by commas."
        ),
    ] = None,
    length: Annotated[int | None, _replacement(help="Tokens in each row, for calibration and for scoring.")] = None,
    blocks: Annotated[str | None, _replacement(help="Range of blocks to prune, such as 4:30.")] = None,
    seeds: Annotated[
        str | None,
        _replacement(
            help="Random seeds, separated by commas. Runs are repeated with every seed, except in figure3 and figure5."
        ),
    ] = None,
    task_path: Annotated[
        Path | None,
        typer.Option(help="Folder with your own task files (.yaml) in lm-eval's format.", show_default="none"),
    ] = None,
) -> None:
    """Run a recipe: prune models in many ways under the same protocol, and write tables and plots of the scores.

    If a model has the name of a model in the paper (arXiv 2407.19126), the table also shows the published numbers.

    The folder of --out keeps scores, surveys and generated texts, but no pruned models. The same command skips finished
    runs.

    Example: secateur compare ./SmolLM2-135M table2 --out table2 --calibration a.txt --perplexity b.txt
    """
    from secateur.paper.recipe import changed, read_recipe

    *models, name = what
    recipe = changed(
        read_recipe(name),
        calibration=calibration,
        perplexity=tuple(perplexity) if perplexity else None,
        tasks=None if tasks is None else parse_list("" if tasks == "none" else tasks),
        limit=limit,
        tokens=tokens,
        samples=parse_integers("--samples", samples),
        refit_samples=parse_integers("--refit-samples", refit_samples),
        length=length,
        blocks=blocks,
        seeds=parse_integers("--seeds", seeds),
    )
    bars = Bars()
    with bars.loading():
        from secateur.paper.dense import compare_dense
        from secateur.paper.grid import compare as run
        from secateur.paper.plots import plot_comparison
        from secateur.paper.tables import compare_table, write_tables

    settings: dict[str, Any] = {"device": run_options.device, "watcher": bars}
    settings["trust_remote_code"] = run_options.trust_remote_code
    try:
        if recipe.kind != "grid":
            files = compare_dense(recipe, models, out, **settings)
            print_result({"out": out, "files": files}, None, [f"Written to {out}: {files}"])
            return
        comparison = run(
            recipe, models, out, task_path=task_path, done=lambda part: write_tables(part, out), **settings
        )
    except KeyboardInterrupt:
        exit_interrupted(f"finished runs are in {out}; run the same command to resume")
    plot_comparison(comparison, out)
    print_result(comparison, *compare_table(comparison, out))
    if comparison.failed:
        first = comparison.failed[0]
        raise SecateurError(f"{len(comparison.failed)} of {comparison.planned} runs failed; the first: {first}")
