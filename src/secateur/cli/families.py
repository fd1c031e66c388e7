"""`secateur families`: which models can be pruned."""

from rich.table import Table

from secateur.cli.generate import expand_options
from secateur.cli.terminal import Bars, print_result


@expand_options
def families() -> None:
    """Print which model families can be pruned, and what of them.

    Example: secateur families
    """
    with Bars().loading():
        from secateur.commands.families import families as rows

    table = Table(title="Families", title_justify="left")
    for name in ("model_type", "heads go", "of the feed-forward", "stock takes", "llama.cpp's"):
        table.add_column(name)
    found = rows()
    for row in found:
        table.add_row(*row)
    print_result(
        found, table, [f"{len(found)} families. --format hf holds whatever goes, in each block its own width."]
    )
