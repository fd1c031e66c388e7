"""The first step of `prune`: open the model, and check the options before any long work."""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from secateur.base.device import pick_device
from secateur.base.errors import SecateurError
from secateur.base.files import existing_path, leftovers, real_path
from secateur.base.memory import MemoryBudget
from secateur.base.output import Output
from secateur.base.processes import Processes
from secateur.base.progress import Watcher, busy_reading
from secateur.base.run_folder import PARTIAL_OUTPUT, run_folder_path
from secateur.base.services import Services
from secateur.checkpoints.checkpoint import Checkpoint, open_checkpoint
from secateur.checkpoints.tokens import begins_with_bos
from secateur.criteria.registry import Criteria, UnitScores
from secateur.fit.recovery import Recovery
from secateur.formats.format import format_class
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.plan.meters import cache_meter
from secateur.plan.problem import SimilarHeads
from secateur.plan.target import SPEEDUPS, Target
from secateur.steps.family_file import read_family
from secateur.steps.memory import memory_limit
from secateur.steps.options import Options, RunOptions, with_settings
from secateur.steps.request import CheckedRequest, check_request, format_of
from secateur.survey.gradients import gradient_scores
from secateur.text.calibration import check_calibration
from secateur.text.draw import HELD_OUT, RowRequest
from secateur.text.self_calibration import check_self
from secateur.text.sources import RANDOM, SELF
from secateur.vocabulary.choose import KeptVocabulary, with_vocabulary
from secateur.vocabulary.kept import original_ids
from secateur.write.hub import check_upload


@dataclass(frozen=True)
class OpenRun:
    """An open model with the options of a run, checked against the model."""

    stream: BlockStream
    options: Options
    run_options: RunOptions
    request: CheckedRequest
    dtype: torch.dtype
    """Dtype of the weights to write."""
    tokenizer: Any
    begins_with_bos: bool
    """Whether the tokenizer begins each text with BOS."""
    started: float
    """Time at which the run began, in seconds of `time.perf_counter`."""
    memory_bytes: int
    """Bytes of memory that the process may use."""
    vocabulary: KeptVocabulary | None
    """The tokens that are kept; None for all."""
    gradients: dict[str, UnitScores] = field(default_factory=dict)
    """Cache of scores from backward passes, by purpose and blocks."""

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
    def recovery(self) -> Recovery:
        """The recovery with its settings."""
        return self.options.recovery_settings

    @property
    def row_request(self) -> RowRequest:
        """The calibration rows that this run needs."""
        options = self.options
        source, refit_source = options.sources
        return RowRequest(
            source=source,
            samples=options.samples,
            length=options.length,
            seed=options.seed,
            refit_source=refit_source,
            refit_samples=options.refit_rows,
            refit_option="refit-samples" if options.refit_samples else "samples",
            held_out=HELD_OUT * options.targets_perplexity,
            random_ids=options.chooses_on_random_ids,
            resamplings=options.resampled_fits,
            fits_weights=self.recovery.fits,
            fits_norm_scale=self.recovery.uses_effort,
        )

    def with_options(self, options: Options) -> "OpenRun":
        """Return a run of the same open model with other options, which are checked against the model.

        Args:
            options: Options with the same dtype.

        Raises:
            SecateurError: As `open_model` does for options that the model or the output format cannot meet.
        """
        return replace(self, options=options, request=check_request(self.stream, options, self.dtype))

    def criteria(
        self,
        purpose: str,
        rows: Rows,
        similar: SimilarHeads | None = None,
        exact: bool = False,
        blocks: range | None = None,
    ) -> Criteria:
        """Return the criterion of every module; a criterion that needs gradients takes one backward pass per purpose.

        Args:
            purpose: Name of the step that needs the criteria; gradient scores are cached by step, criterion and blocks.
            rows: Rows of the backward pass.
            similar: Heads that are removed before all others.
            exact: Whether the plan names the units to keep, so that no gradients are needed.
            blocks: Blocks of the backward pass; all of them by default.
        """
        name = self.options.criterion_name
        key = f"{purpose} {name} {blocks}"
        if Criteria(name).needs_gradients and not exact and key not in self.gradients:
            self.gradients[key] = gradient_scores(self.stream, rows, name, blocks=blocks)
        return Criteria(name, self.gradients.get(key), similar.candidates if similar else None)


def open_model(
    model: str | Path,
    options: Options | None = None,
    run_options: RunOptions | None = None,
    *,
    out: Path | None = None,
    services: Services | None = None,
    **settings: Any,
) -> OpenRun:
    """Open a model, and check the options before any long work.

    Args:
        model: A folder, a .gguf file or a Hugging Face Hub id.
        options: Options that decide the result.
        run_options: Options that do not change the result, such as the device.
        out: Folder or .gguf file that the run will write, to check that it can be written.
        services: Processes, batch size and progress output of the run.
        settings: Fields of `Options` and `RunOptions` by name, in place of the two objects.

    Raises:
        SecateurError: The model or an option is wrong.
    """
    if not isinstance(model, str | Path):
        raise TypeError(f"model is of {type(model)}; name a folder, a file or a hub id, or use secateur.prune_model")
    started = time.perf_counter()
    options, run_options = with_settings(options, run_options, settings)
    services = services or Services()
    device = check_options(options, run_options, services.processes)
    if services.processes.is_first:
        _check_files(model, out, options, run_options, services.watcher)
    # Rank 0 comes first, so that only one process downloads the model.
    with busy_reading(services.watcher, "Opening", str(model)), services.processes.first_rank_first():
        checkpoint = open_checkpoint(
            model,
            revision=run_options.revision,
            trust_remote_code=run_options.trust_remote_code,
            dtype=options.torch_dtype or torch.bfloat16,
        )
    run = open_run(checkpoint, options, run_options, device=device, out=out, services=services)
    return replace(run, started=started)


def open_run(
    checkpoint: Checkpoint,
    options: Options,
    run_options: RunOptions,
    *,
    device: torch.device,
    out: Path | None = None,
    services: Services,
) -> OpenRun:
    """Return the run of an open checkpoint, and check the options against it; see `open_model`."""
    started = time.perf_counter()
    checkpoint, vocabulary = with_vocabulary(
        checkpoint,
        options.vocabulary,
        calibration=options.calibration,
        length=options.length,
        device=device,
        services=services,
    )
    stream = BlockStream(checkpoint, device=device, services=services)
    dtype = options.torch_dtype or checkpoint.dtype
    needs_tokenizer = set(options.sources) != {RANDOM} or options.output_format.tokenizer
    tokenizer = checkpoint.tokenizer() if needs_tokenizer or checkpoint.has_tokenizer else None
    # A folder from which tokens were cut has a file about them, which is needed at the end.
    original_ids(checkpoint)
    if out is not None and services.processes.is_first:
        partial_output = run_folder_path(real_path(out)) / PARTIAL_OUTPUT
        format_of(stream, options, dtype).check_output(
            out, overwrite=run_options.overwrite, partial_output=partial_output
        )
    request = check_request(stream, options, dtype)
    if run_options.family is not None:
        request.format.check_family()
    request.format.check_tokenizer(tokenizer)
    if SELF in options.sources:
        cache_bytes = cache_meter(stream, checkpoint.dtype).dense
        check_self(checkpoint, tokenizer, length=options.length, cache_bytes=cache_bytes, device=device)
    # There are about as many resampled rows as rows of text.
    rows = max(options.samples, options.refit_rows or 0) * (2 if options.resampled_fits else 1)
    tokens = rows * options.length // services.processes.size
    memory, activations = memory_limit(stream, options, run_options.memory, tokens)
    stream = stream.using(budget=MemoryBudget(activations))
    return OpenRun(
        stream,
        options,
        run_options,
        request,
        dtype,
        tokenizer,
        begins_with_bos(tokenizer),
        started,
        memory,
        vocabulary,
    )


def check_options(options: Options, run_options: RunOptions, processes: Processes) -> torch.device:
    """Check the options that can be checked without the model, read the family file, and return the device."""
    target = options.size_target
    if isinstance(target, Target) and target.quantity in SPEEDUPS and not processes.is_single:
        raise SecateurError(
            f"target {target} is a speed, which only a run with one process can measure; write the widths to a file "
            "with secateur plan, and pass that file to --plan"
        )
    if run_options.family is not None:
        read_family(run_options.family)
    if options.type != Options.type:
        format_class(options.output_format.name).check_type(options.type)
    return pick_device(run_options.device)


def _check_files(
    model: str | Path, out: Path | None, options: Options, run_options: RunOptions, watcher: Watcher
) -> None:
    """Check the calibration text, the output and the upload before anything is downloaded or dequantised."""
    for source in dict.fromkeys(options.sources):
        check_calibration(source, samples=options.samples, length=options.length)
    if out is not None:
        # The output is checked again once its size is known.
        target = options.output_format.output(out, source=existing_path(model), overwrite=run_options.overwrite)
        target.check()
        note_leftovers(out, watcher)
    check_survey_path(run_options.survey, out)
    if run_options.push_to_hub is not None:
        check_upload(run_options.push_to_hub)


def note_leftovers(out: Path, watcher: Watcher) -> None:
    """Note what killed runs have left next to an output."""
    for left in leftovers(out):
        watcher.note(f"{left} was left by a run that was killed; delete it, unless another run is writing it now")


def check_survey_path(survey: Path | None, out: Path | None) -> None:
    """Check that a new survey can be written, and that its path is not inside the other output.

    Raises:
        SecateurError: The path is a folder, cannot be written, or is inside `out`.
    """
    if survey is None:
        return
    if out is not None and out.absolute() in (survey.absolute(), *survey.absolute().parents):
        raise SecateurError(f"{survey}: the survey cannot be inside the output {out}; choose another path for --survey")
    if survey.is_dir():
        raise SecateurError(f"{survey}: this is a folder; name a JSON file for --survey")
    if not survey.exists():
        Output(survey, suffix="").check()
