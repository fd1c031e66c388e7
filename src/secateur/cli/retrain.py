"""`secateur retrain`: retrain a pruned folder with LoRA."""

from typing import Annotated

from secateur.cli.bars import Bars
from secateur.cli.generate import Only, expand_options
from secateur.cli.terminal import print_result
from secateur.cli.values import OutFolder, PrunedFolder
from secateur.commands.options import RunOptions
from secateur.retraining.options import Training


@expand_options
def retrain(
    folder: PrunedFolder,
    out: OutFolder,
    training: Training,
    run_options: Annotated[RunOptions, Only(("device", "overwrite", "restart"))],
) -> None:
    """Retrain a pruned model with LoRA, and merge the adapters into the weights. Needs secateur\\[lora].

    Example: secateur retrain ./SmolLM2-pruned ./SmolLM2-retrained --calibration text.txt
    """
    bars = Bars()
    with bars.loading():
        from secateur.retraining.retrain import retrain as run

    done = run(
        folder,
        out,
        training,
        device=run_options.device,
        overwrite=run_options.overwrite,
        restart=run_options.restart,
        watcher=bars,
    )
    before, after = done.perplexity
    line = f"Perplexity on held-out rows: {before:.3f} before, {after:.3f} after. Written to {done.path}"
    print_result(done, None, [line])
