"""`secateur compare`: a recipe carried out."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.base.errors import SecateurError
from secateur.cli.generate import Only, expand_options
from secateur.cli.terminal import Bars, exit_interrupted, print_result
from secateur.cli.values import parse_list, parse_whole_numbers
from secateur.commands.options import RunOptions
from secateur.paper.recipes import recipe_names

_in_place = partial(typer.Option, show_default="as in the recipe", rich_help_panel="In place of the recipe's")


@expand_options
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
    run_options: Annotated[RunOptions, Only(("device", "trust_remote_code"))],
    calibration: Annotated[
        str | None,
        _in_place(help="Calibrate on this text, see secateur prune; random ids, and what the model writes, stay."),
    ] = None,
    perplexity: Annotated[
        list[str] | None,
        _in_place(
            help="Score this text. NAME=TEXT puts it into the column NAME, beside what is published for that. May be "
            "given several times."
        ),
    ] = None,
    tasks: Annotated[
        str | None, _in_place(help="Score these tasks of lm-eval, with commas; or NAME=TASK; none for no tasks.")
    ] = None,
    limit: Annotated[int | None, _in_place(help="Items from the start of each task; 0 for all.")] = None,
    tokens: Annotated[int | None, _in_place(help="Tokens to score of each text; 0 for all.")] = None,
    samples: Annotated[
        str | None, _in_place(help="Calibration rows; several with commas where the recipe has an axis of them.")
    ] = None,
    refit_samples: Annotated[
        str | None,
        _in_place(
            help="Rows of its own for the recovery, in runs that have such, and rows to retrain on; several with "
            "commas where the recipe has an axis of them."
        ),
    ] = None,
    length: Annotated[int | None, _in_place(help="Tokens in each row, of calibration and scoring.")] = None,
    blocks: Annotated[str | None, _in_place(help="Blocks to prune, such as 4:30.")] = None,
    seeds: Annotated[
        str | None, _in_place(help="Seeds, with commas; each run is made with every one, but for figures 3 and 5.")
    ] = None,
    task_path: Annotated[
        Path | None,
        typer.Option(help="A folder with task files (.yaml) of your own, in lm-eval's form.", show_default="none"),
    ] = None,
) -> None:
    """Carry out a recipe: prune models in many ways under one protocol, and put the scores into a table and plots.

    Where the model is the paper's, by the name of its folder or hub id, the paper's figures stand beside.

    Scores, surveys and written texts are kept, no pruned models. A run that is finished is not made again, however the
    last command ended.

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
        samples=parse_whole_numbers("samples", samples),
        refit_samples=parse_whole_numbers("refit-samples", refit_samples),
        length=length,
        blocks=blocks,
        seeds=parse_whole_numbers("seeds", seeds),
    )
    bars = Bars()
    with bars.loading():
        from secateur.paper.dense import compare_dense
        from secateur.paper.grid import compare as run
        from secateur.paper.plots import plot_comparison
        from secateur.paper.tables import compare_table, write_tables

    how: dict[str, Any] = {"device": run_options.device, "watcher": bars}
    how["trust_remote_code"] = run_options.trust_remote_code
    try:
        if recipe.kind != "grid":
            made = compare_dense(recipe, models, out, **how)
            print_result({"out": out, "files": made}, None, [f"{made} are in {out}"])
            return
        found = run(recipe, models, out, task_path=task_path, done=lambda part: write_tables(part, out), **how)
    except KeyboardInterrupt:
        exit_interrupted(f"finished runs are in {out}; the same command goes on from there")
    plot_comparison(found, out)
    print_result(found, *compare_table(found, out), bars)
    if found.failed:
        raise SecateurError(f"{len(found.failed)} of {found.planned} runs failed; the first, {found.failed[0]}")
