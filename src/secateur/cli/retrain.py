"""`secateur retrain`: train a pruned folder further."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.bars import Bars
from secateur.cli.generate import Only, PrunedFolder, expand_options
from secateur.cli.processes import ProcessOptions, run_in_processes
from secateur.cli.terminal import print_result
from secateur.retraining.options import Training
from secateur.steps.options import RunOptions

OPTIONS = ("device", "memory", "overwrite", "restart", "trust_remote_code")
TEXTS = {
    "memory": {
        "help": "Upper bound on the memory of this process, of the GPU if it trains there: an amount such as 8GB, or a "
        "share of the free memory such as 50%. What does not fit is computed again.",
        "default_text": "half of the free memory, or 80 % of a GPU's",
    },
}


@expand_options
def retrain(
    folder: PrunedFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    training: Training,
    run_options: Annotated[RunOptions, Only(OPTIONS, texts=TEXTS)],
    process_options: ProcessOptions,
) -> None:
    """Train a pruned model for a while, so that it recovers some of the quality that pruning has cost.

    The model learns from a text, and from the next-token distributions of the model before pruning (the teacher).
    If another tool pruned DIR, --teacher is needed. --rank needs secateur\\[lora].

    Example: secateur retrain ./SmolLM2-pruned ./SmolLM2-healed --tokens 256k
    """
    run_in_processes(process_options)
    bars = Bars()
    with bars.loading():
        from secateur.retraining.retrain import retrain as run

    done = run(
        folder,
        out,
        training,
        device=run_options.device,
        memory=run_options.memory,
        overwrite=run_options.overwrite,
        restart=run_options.restart,
        trust_remote_code=run_options.trust_remote_code,
        watcher=bars,
    )
    before, after = done.perplexity
    teacher = "" if done.curve.teacher is None else f" (teacher: {done.curve.teacher:.3f})"
    line = f"Perplexity on held-out rows: {before:.3f} before, {after:.3f} after{teacher}. Written to {out}"
    print_result(done, None, [line])
