"""The first step: a model opened, and everything found that is wrong with what is asked of it."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from secateur.base.device import pick_device
from secateur.base.errors import SecateurError
from secateur.base.files import leftovers, local_path
from secateur.base.processes import Processes
from secateur.base.progress import Watcher, busy_reading
from secateur.base.run_folder import PARTIAL_OUTPUT, run_folder_path
from secateur.base.services import Services
from secateur.commands.memory import memory_limit
from secateur.commands.options import Options, RunOptions, with_settings
from secateur.commands.request import CheckedRequest, check_request, format_of
from secateur.criteria.registry import Criteria, UnitScores
from secateur.fit.block import Method
from secateur.fit.recovery import Recovery
from secateur.formats.family_file import read_family
from secateur.formats.format import format_class
from secateur.model.checkpoint import open_checkpoint
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.model.tokens import begins_with_bos
from secateur.plan.meters import cache_meter
from secateur.plan.problem import FirstHeads
from secateur.plan.target import SPEEDUPS, Target
from secateur.survey.gradients import gradient_scores
from secateur.text.calibration import check_calibration
from secateur.text.draw import HELD_OUT, CalibrationRows, RowRequest
from secateur.text.self_calibration import check_self
from secateur.text.sources import RANDOM, SELF
from secateur.write.hub import check_upload


@dataclass(frozen=True)
class OpenRun:
    """An open model, and what is asked of it."""

    stream: BlockStream
    options: Options
    run_options: RunOptions
    request: CheckedRequest
    dtype: torch.dtype
    """Of the weights to write."""
    tokenizer: Any
    begins_with_bos: bool
    started: float
    memory: int
    """Bytes that the process may take."""
    gradients: dict[str, UnitScores] = field(default_factory=dict)
    """Scores from backward passes that were made, by what they are for."""

    @property
    def services(self) -> Services:
        """The resources of this run."""
        return self.stream.services

    @property
    def processes(self) -> Processes:
        """The processes of this run."""
        return self.stream.processes

    @property
    def watcher(self) -> Watcher:
        """The progress output of this run."""
        return self.stream.services.watcher

    @property
    def row_request(self) -> RowRequest:
        """The rows that the run needs."""
        options = self.options
        source, refit_source = options.sources
        return RowRequest(
            source=source,
            samples=options.samples,
            length=options.length,
            seed=options.seed,
            refit_source=refit_source,
            refit_samples=options.refit_rows,
            refit_option=options.refit_option,
            held_out=HELD_OUT * options.targets_perplexity,
            random_ids=options.chooses_on_random_ids,
            resamplings=options.resampled_fits,
            fits_weights=self.recovery.fits,
            fits_norm_scale=self.recovery.uses_effort,
        )

    @property
    def recovery(self) -> Recovery:
        """What is done about the loss."""
        return self.options.recovery_settings

    def method(self, rows: CalibrationRows, first: FirstHeads | None, exact: bool) -> Method:
        """How units are chosen and refitted; with `exact`, no criterion is asked."""
        return Method(self.criteria("fit", Rows.of(rows.selection), first, exact), self.recovery, self.options.seed)

    def criteria(
        self,
        purpose: str,
        rows: Rows,
        first: FirstHeads | None = None,
        exact: bool = False,
        blocks: range | None = None,
    ) -> Criteria:
        """The criterion of every module, made ready; one backward pass for each purpose, where one needs gradients."""
        name = self.options.criterion_name
        key = f"{purpose} {blocks}"
        if Criteria(name).needs_gradients and not exact and key not in self.gradients:
            self.gradients[key] = gradient_scores(self.stream, rows, name, blocks=blocks)
        return Criteria(name, self.gradients.get(key), first.candidates if first else None)


def open_model(
    model: str | Path,
    options: Options | None = None,
    run_options: RunOptions | None = None,
    *,
    out: Path | None = None,
    services: Services | None = None,
    **settings: Any,
) -> OpenRun:
    """Open a model, and find what is wrong with the request before any long work.

    Args:
        model: a folder, a .gguf file or a hub id.
        out: the folder or the .gguf file that will be written, to be checked too.
        services: processes, batch size and progress output of the run.
        settings: in place of `options` and `run_options`, any of their fields by name.

    Raises:
        SecateurError: for anything wrong with the model or the request.
    """
    options, run_options = with_settings(options, run_options, settings)
    services, started = services or Services(), time.perf_counter()
    processes, watcher = services.processes, services.watcher
    goal = options.size_target
    if isinstance(goal, Target) and goal.quantity in SPEEDUPS and not processes.is_single:
        raise SecateurError(
            f"target {goal} is measured by one process alone; let secateur plan write the widths to a file, and name "
            "it by --plan"
        )
    if run_options.family is not None:
        read_family(run_options.family)
    where = pick_device(run_options.device)
    for source in dict.fromkeys(options.sources) if processes.is_first else ():
        check_calibration(source, samples=options.samples, length=options.length)
    if options.type != Options.type:
        format_class(options.output_format.name).check_type(options.type)
    if out is not None and processes.is_first:
        # Once more with the sizes below; here before anything is downloaded or dequantised.
        folder = Path(model) if Path(model).is_dir() else None
        options.output_format.output(out, source=folder, overwrite=run_options.overwrite).check()
        for left in leftovers(out):
            watcher.note(f"{left}: left by a run that was killed; delete it, unless another run is writing it now")
    if run_options.push_to_hub is not None and processes.is_first:
        check_upload(run_options.push_to_hub)
    wanted = getattr(torch, options.dtype) if options.dtype else None
    with busy_reading(watcher, "Opening", str(model)), processes.first_rank_first():
        checkpoint = open_checkpoint(
            model,
            revision=run_options.revision,
            trust_remote_code=run_options.trust_remote_code,
            dtype=wanted or torch.bfloat16,
        )
    stream = BlockStream(checkpoint, device=where, services=services)
    dtype = wanted or checkpoint.dtype
    # Random ids need no tokenizer, and most outputs do without.
    spared = not checkpoint.has_tokenizer and set(options.sources) == {RANDOM} and not options.output_format.tokenizer
    tokenizer = None if spared else checkpoint.tokenizer()
    if out is not None and processes.is_first:
        growing = run_folder_path(local_path(out).resolve()) / PARTIAL_OUTPUT
        format_of(stream, options, dtype).check_output(out, overwrite=run_options.overwrite, growing=growing)
    request = check_request(stream, options, dtype)
    if run_options.family is not None:
        request.format.check_family()
    request.format.check_tokenizer(tokenizer)
    if SELF in options.sources:
        cached = cache_meter(stream, checkpoint.dtype).dense
        check_self(checkpoint, tokenizer, length=options.length, cache_bytes=cached, device=where)
    apart = options.refit_rows is not None or options.chooses_on_random_ids
    input_steps = options.recovery_settings.input_steps > 0
    memory, spare = memory_limit(stream, run_options.memory, input_steps=input_steps, apart=apart)
    stream = stream.using(activation_bytes=spare)
    return OpenRun(stream, options, run_options, request, dtype, tokenizer, begins_with_bos(tokenizer), started, memory)
