"""`secateur doctor`: which engines run a pruned model."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from secateur.cli.generate import Only, expand_options
from secateur.cli.terminal import Bars, print_result
from secateur.commands.options import RunOptions


@expand_options
def doctor(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A folder or .gguf file that secateur wrote.", show_default=False)
    ],
    run_options: Annotated[RunOptions, Only(("trust_remote_code",))],
) -> None:
    """Open OUT in each engine that is installed, and say which of them run it.

    transformers and vLLM write some tokens, lm-eval scores a text, peft adapts the layers, llama.cpp runs a file.

    Example: secateur doctor ./SmolLM2-pruned
    """
    bars = Bars()
    with bars.loading():
        from secateur.commands.doctor import check_engines

    found = check_engines(out, trust_remote_code=run_options.trust_remote_code, watcher=bars)
    table = Table(title="Engines", title_justify="left", show_lines=True)
    for name in ("engine", "version", "runs", "what was seen"):
        table.add_column(name)
    marks = {True: "yes", False: "no", None: ""}
    for engine in found:
        table.add_row(engine.name, engine.version or "", marks[engine.runs], engine.message)
    print_result(found, table, [f"{engine.name}: {engine.command}" for engine in found if engine.runs is not False])
