"""`secateur families`: list the model families that can be pruned."""

from rich.table import Table

from secateur.cli.bars import Bars
from secateur.cli.generate import expand_options
from secateur.cli.terminal import print_result


@expand_options
def families() -> None:
    """List the model families that can be pruned, what can be removed from each, and their formats.

    Example: secateur families
    """
    with Bars().loading():
        from secateur.commands.families import list_families

    table = Table(title="Families", title_justify="left")
    for name in (
        "model_type",
        "heads can be removed",
        "feed-forward units",
        "number of heads in --format stock",
        "GGUF architecture",
    ):
        table.add_column(name)
    found = list_families()
    for row in found:
        table.add_row(*row)
    print_result(found, table, [f"{len(found)} families. --format hf stores every pruned model of these families."])
