"""`secateur trim`: write a checkpoint with fewer tokens."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.bars import Bars
from secateur.cli.generate import Model, Only, expand_options
from secateur.cli.terminal import print_result
from secateur.steps.options import Options, RunOptions

TEXTS = {
    "vocabulary": {"default_text": "none; must be given"},
    "calibration": {
        "help": "Text whose tokens are counted: general (a mix of texts that comes with secateur), general+TEXT or "
        "TEXT. TEXT is a .txt file, a .jsonl file with the key text or messages, - for standard input, or a data set "
        "(wikitext2, c4, ptb, bookcorpus or name:config:column)."
    },
    "length": {"help": "Tokens in each row on which the cost of the cut is measured."},
}
"""Help of options that have a narrower meaning here than in `secateur prune`."""


@expand_options
def trim(
    model: Model,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="The folder to write; it appears only once it is complete.", show_default=False
        ),
    ],
    options: Annotated[Options, Only(("vocabulary", "calibration", "length"), texts=TEXTS)],
    run_options: Annotated[RunOptions, Only(("device", "revision", "trust_remote_code", "overwrite"))],
) -> None:
    """Cut tokens from the vocabulary of MODEL, and write the smaller checkpoint to OUT. Blocks are unchanged.

    secateur prune --vocabulary does the same and also prunes the blocks.

    Example: secateur trim ./gemma-3-270m ./gemma-latin --vocabulary latin
    """
    bars = Bars()
    with bars.loading():
        from secateur.report.tables import trim_table
        from secateur.vocabulary.trim import trim as run

    done = run(
        model,
        out,
        vocabulary=options.vocabulary,
        calibration=options.calibration,
        length=options.length,
        device=run_options.device,
        revision=run_options.revision,
        trust_remote_code=run_options.trust_remote_code,
        overwrite=run_options.overwrite,
        watcher=bars,
    )
    print_result(done, *trim_table(done, out))
