"""`secateur doctor`: try a pruned model in each installed engine."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.bars import Bars
from secateur.cli.generate import Only, expand_options
from secateur.cli.terminal import print_result
from secateur.steps.options import RunOptions


@expand_options
def doctor(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A folder or .gguf file written by secateur.", show_default=False)
    ],
    run_options: Annotated[RunOptions, Only(("trust_remote_code",))],
) -> None:
    """Load OUT in each installed engine, and report which of them run it.

    transformers, vLLM and llama.cpp generate a few tokens, lm-eval scores a text, and peft adds adapters to the layers.

    Example: secateur doctor ./SmolLM2-pruned
    """
    bars = Bars()
    with bars.loading():
        from secateur.commands.doctor import check_engines
        from secateur.report.tables import make_table

    engines = check_engines(out, trust_remote_code=run_options.trust_remote_code, watcher=bars)
    marks = {True: "yes", False: "no", None: ""}
    rows = [(engine.name, engine.version or "", marks[engine.runs], engine.message) for engine in engines]
    table = make_table("Engines", ("engine", "version", "runs", "result"), rows, texts=range(4), lines=True)
    print_result(engines, table, [f"{engine.name}: {engine.command}" for engine in engines if engine.runs is not False])
