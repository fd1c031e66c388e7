"""`secateur families`: list the model families that can be pruned."""

from secateur.cli.bars import Bars
from secateur.cli.generate import expand_options
from secateur.cli.terminal import print_result

COLUMNS = (
    "model_type",
    "heads can be removed",
    "feed-forward units",
    "number of heads in --format stock",
    "GGUF architecture",
)


@expand_options
def families() -> None:
    """List the model families that can be pruned, what can be removed from each, and their formats.

    Example: secateur families
    """
    with Bars().loading():
        from secateur.commands.families import list_families
        from secateur.report.tables import make_table

    found = list_families()
    table = make_table("Families", COLUMNS, found, texts=range(len(COLUMNS)))
    print_result(found, table, [f"{len(found)} families. --format hf stores every pruned model of these families."])
