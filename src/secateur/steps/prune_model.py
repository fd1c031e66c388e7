"""`prune_model`: prune a transformers model in memory, and return a smaller one."""

from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from secateur.base.errors import SecateurError
from secateur.base.options import changed_options
from secateur.base.progress import Silent, Watcher
from secateur.base.services import Services
from secateur.checkpoints.in_memory import check_in_memory, checkpoint_in_memory
from secateur.formats.folder import Folder
from secateur.steps.draw_rows import draw_rows
from secateur.steps.fit_blocks import fit_blocks
from secateur.steps.open_model import check_options, open_run
from secateur.steps.options import Options, RunOptions, with_settings
from secateur.steps.plan_widths import plan_widths
from secateur.steps.resume import retry_in_smaller_batches
from secateur.steps.survey_model import survey_model
from secateur.steps.write_model import pruned_model
from secateur.text.calibration import check_calibration
from secateur.text.sources import RANDOM, SELF

REFUSED = ("dry_run", "overwrite", "push_to_hub", "restart", "trust_remote_code", "revision")
"""Options that make no sense for a model in memory."""


def prune_model(
    model: Any,
    tokenizer: Any = None,
    options: Options | None = None,
    *,
    watcher: Watcher | None = None,
    **settings: Any,
) -> Any:
    """Prune a model in memory in one shot, and return a smaller model; the given model is not changed.

    The result has the weights that `prune` writes for the same model and options, and the given model's settings for
    generation, attention and experts. It generates, trains and is saved like any other model of transformers:
    `save_pretrained` writes a folder that `from_pretrained` opens. Config and tokenizer are in a temporary folder
    meanwhile; weights are not written.

    Args:
        model: A causal language model of transformers, on any device.
        tokenizer: Its tokenizer; it may be None with `calibration="random"`.
        options: Options that decide the result.
        watcher: Receives progress and notes.
        settings: Fields of `Options` and `RunOptions` by name: `sparsity=0.25`, `widths="uniform"`, ...

    Returns:
        The pruned model, on the device of the given model, in evaluation mode.

    Raises:
        SecateurError: The model cannot be pruned, or an option is wrong.
    """
    options, run_options = with_settings(options, None, settings)
    services = Services(watcher=watcher or Silent())
    check_in_memory(model)
    _check(options, run_options, tokenizer)
    device = check_options(options, run_options, services.processes)
    with TemporaryDirectory(prefix="secateur-") as folder:
        checkpoint = checkpoint_in_memory(model, tokenizer, Path(folder))

        def run_steps(services: Services) -> Any:
            run = open_run(checkpoint, options, run_options, device=device, services=services)
            rows = draw_rows(run)
            plan, format = plan_widths(run, rows, survey_model(run, rows)), run.request.format
            assert isinstance(format, Folder)
            with pruned_model(run, plan, fit_blocks(run, rows, plan), []) as pruned:
                return format.build(pruned).to(model.device)

        return _set_up(retry_in_smaller_batches(services, run_steps), model)


def _set_up(pruned: Any, model: Any) -> Any:
    """Give the pruned model the settings of the given model that config.json does not have, and return it."""
    pruned.generation_config = deepcopy(model.generation_config)
    parts = {key: part for key in model.config.sub_configs if (part := getattr(model.config, key)) is not None}
    pruned.set_attn_implementation(
        {key: part._attn_implementation for key, part in ({"": model.config} | parts).items()}
    )
    if (experts := getattr(model.config, "_experts_implementation", None)) is not None:
        pruned.set_experts_implementation(experts)
    return pruned


def _check(options: Options, run_options: RunOptions, tokenizer: Any) -> None:
    """Check what can be checked without the model.

    Raises:
        SecateurError: An option is only for files, or the calibration text cannot be read or tokenised.
    """
    for name in changed_options(run_options, REFUSED):
        raise SecateurError(f"{name} is for prune, which reads and writes files; leave it out")
    if options.vocabulary != Options.vocabulary:
        raise SecateurError(
            "vocabulary changes the tokenizer too, which is not returned; save the model and the tokenizer, call trim, "
            "and open its output"
        )
    if options.output_format.suffix is not None:
        raise SecateurError(f"format {options.format} is a file; save the pruned model, then call export")
    if SELF in options.sources:
        raise SecateurError("calibration 'self' reads the model from a folder; save the model, and call prune")
    for source in dict.fromkeys(options.sources):
        if tokenizer is None and source != RANDOM:
            raise SecateurError(f"calibration {source} needs a tokenizer; pass the model's, or calibration='random'")
        check_calibration(source, samples=options.samples, length=options.length)
