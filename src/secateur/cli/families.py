"""`secateur families`: list the model families that can be pruned, or describe one model."""

from typing import Annotated

import typer

from secateur.cli.bars import Bars
from secateur.cli.generate import Only, expand_options
from secateur.cli.terminal import print_result
from secateur.steps.options import RunOptions

COLUMNS = ("model_type", "GGUF architecture", "in vLLM")
MODULE_COLUMNS = ("blocks", "module", "units", "layers", "keys in config.json", "locked because")


@expand_options
def families(
    run_options: Annotated[RunOptions, Only(("trust_remote_code",))],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A model, whose modules and units are then listed: a folder, a hub id or a .gguf file.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """List the model families of which more is known than their class tells; or describe the modules of MODEL.

    What can be removed from a model is read off its class: secateur families MODEL prints what was found.

    Example: secateur families ./SmolLM2-135M
    """
    with Bars().loading():
        from secateur.commands.families import describe_model, list_families
        from secateur.report.tables import make_table

    if model is not None:
        modules = describe_model(model, trust_remote_code=run_options.trust_remote_code)
        table = make_table("Modules", MODULE_COLUMNS, modules, texts=range(len(MODULE_COLUMNS)), lines=True)
        print_result(modules, table, ["--format hf stores any numbers of units that are not locked."])
        return
    found = list_families()
    table = make_table("Families", COLUMNS, found, texts=range(len(COLUMNS)))
    print_result(
        found,
        table,
        [
            f"{len(found)} families. Other decoders are pruned too; secateur families MODEL prints what is removed.",
        ],
    )
