"""What all commands begin with: an open model, a request checked against it, and its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from secateur.base.device import pick_device
from secateur.base.errors import SecateurError
from secateur.base.progress import Watcher, reading
from secateur.base.words import counted
from secateur.commands.options import Options
from secateur.criteria import NEEDS_GRADIENTS
from secateur.fit.average import FittedBlock
from secateur.fit.loop import Method, refit
from secateur.fit.recovery import Recovery
from secateur.fit.temper import scaled, temper
from secateur.formats.gguf_architectures import TYPES, check_type
from secateur.formats.gguf_tokenizer import vocabulary
from secateur.model.activations import Activations, Rows
from secateur.model.checkpoint import open_checkpoint
from secateur.model.stream import BlockStream
from secateur.model.tokens import begins_with_bos
from secateur.plan.decide import Request, check_survey, request
from secateur.plan.meters import parameter_meter
from secateur.plan.plan import Plan
from secateur.plan.search import HELD_OUT
from secateur.survey.gradients import UnitScores, gradient_scores
from secateur.survey.loss import mean_loss
from secateur.text.draw import Drawn, check_sources, check_writing, draw
from secateur.text.more_rows import more_rows
from secateur.write.export import check_file
from secateur.write.write import output_folder
from secateur.write.writer import OutputFolder, leftovers

UNSEEN_SHARE = 32
"""One calibration row in so many is left out of the refit, for the scale of the final norm."""


@dataclass(frozen=True)
class Job:
    """An open model, the request checked against it, and the calibration rows."""

    stream: BlockStream
    options: Options
    dtype: torch.dtype
    """Of the weights to write."""
    request: Request
    drawn: Drawn
    bos: bool
    more: Tensor | None = None
    """Rows that each fit takes beside the text's (fits x rows x length)."""
    scores: UnitScores = field(default_factory=dict)
    """Of a criterion that needs gradients: filled by the first refit, for all others."""

    def with_more(self, watcher: Watcher) -> Job:
        """The same job with more rows, where the recovery gains by them and they are not there yet."""
        if not self.options.fits_more or self.more is not None:
            return self
        return replace(self, more=more_rows(self.stream, self.options, self.fitted, watcher=watcher))

    @property
    def fitted(self) -> Tensor:
        """The rows of the text that the refit is fitted to."""
        return self._refit_text[: len(self._refit_text) - len(self.unseen)]

    @property
    def text(self) -> Tensor:
        """Calibration rows (rows x length)."""
        return self.drawn.text

    @property
    def unseen(self) -> Tensor:
        """Rows that the refit only runs along, to fit the final norm on; none where nothing is refitted, or few."""
        count = len(self._refit_text) // UNSEEN_SHARE if self.method.recovery.method == "refit" else 0
        return self._refit_text[len(self._refit_text) - count :]

    @property
    def _refit_text(self) -> Tensor:
        return self.text if self.drawn.fitted is None else self.drawn.fitted

    @cached_property
    def rows(self) -> Rows:
        """What the refit runs on: rows to fit, unseen ones, rows by which alone units are chosen, held-out ones."""
        drawn, rows = self.drawn, self._opened(self.fitted)
        if self.more is not None:
            rows = rows.with_versions(*self.more)
        if len(self.unseen):
            rows = rows.along(self.unseen)
        if drawn.sigma is not None:
            rows = rows.scored_by(Rows.of(drawn.sigma))
        elif drawn.fitted is not None:
            rows = rows.scored_by(self._opened(self.text))
        return rows if drawn.held_out is None else rows.along(drawn.held_out)

    def _opened(self, rows: Tensor) -> Rows:
        # Openings are there for fits; where nothing is fitted, means and scores are those of the text itself.
        return Rows.of(rows) if self.bos or not self.method.recovery.fits else Rows.of(rows).with_openings()

    @property
    def method(self) -> Method:
        """How units are chosen and what is done about the loss."""
        options = self.options
        recovery = Recovery(options.recovery, options.recover, options.ridge, options.intercept, options.level1)
        similar = self.request.similar
        return Method(options.scores, recovery, options.seed, similar=similar.candidates if similar else {})

    def loss(self, decided: Plan, watcher: Watcher) -> float:
        """Perplexity over dense on the held-out rows, the plan carried out and thrown away."""
        rows, losses = self.rows, list[float]()
        group = len(rows.groups) - 1

        def judge(dense: Activations, pruned: Activations) -> None:
            norm = scaled(self.stream, self.scale(rows, dense, pruned))
            losses.append(mean_loss(self.stream, rows, group, dense))
            losses.append(mean_loss(self.stream, rows, group, pruned, norm))

        for _ in self.refit(decided, rows, watcher, judge):
            pass
        ratio = math.exp(losses[1] - losses[0])
        watcher.note(f"{decided.sparsity:.1%} gone: perplexity {ratio:.3f} x dense on {HELD_OUT} other rows")
        return ratio

    def refit(
        self,
        decided: Plan,
        rows: Rows,
        watcher: Watcher,
        judge: Callable[[Activations, Activations], None] | None,
    ) -> Generator[FittedBlock, None, None]:
        """Carry a plan out, block by block."""
        method = self.method
        if self.options.choice.uses(NEEDS_GRADIENTS) and not decided.keeps:
            if not self.scores:
                self.scores.update(gradient_scores(self.stream, self.text, self.options.criterion, watcher=watcher))
            method = replace(method, scores=self.scores)
        return refit(self.stream, decided, rows, method=method, dtype=self.dtype, watcher=watcher, judge=judge)

    def scale(self, rows: Rows, dense: Activations, pruned: Activations) -> float:
        """Of the final norm, fitted on the unseen rows; 1 where there are none."""
        if not len(self.unseen):
            return 1.0
        return temper(self.stream, rows, rows.weights.index(0.0), dense, pruned)


def open_job(
    model: str | Path,
    options: Options,
    *,
    device: str,
    revision: str | None = None,
    trust_remote_code: bool,
    out: Path | None = None,
    overwrite: bool = False,
    survey_file: Path | None = None,
    save_calibration: Path | None = None,
    dry: bool = False,
    watcher: Watcher,
) -> Job:
    """Open the model and the text, and find everything that is wrong with the request.

    Raises:
        SecateurError: see `prune`.
    """
    where = pick_device(device)
    check_sources(options, save_calibration)
    if out is not None:
        # Once more with the sizes below; here before anything is downloaded or dequantised.
        _check_out(out, options, Path(model) if Path(model).is_dir() else None, overwrite)
        for left in leftovers(out):
            watcher.note(f"{left}: left by a run that was killed; delete it, unless another run is writing it now")
    wanted = getattr(torch, options.dtype) if options.dtype else None
    with reading(watcher, "Opening", str(model)):
        checkpoint = open_checkpoint(
            model, revision=revision, trust_remote_code=trust_remote_code, dtype=wanted or torch.bfloat16
        )
        dtype = wanted or checkpoint.dtype
        stream = BlockStream(checkpoint, device=where)
    tokenizer = checkpoint.tokenizer()
    if out is not None:
        file = options.format == "gguf"
        folder = output_folder(stream, _beside(out) if file else out, None, overwrite=overwrite, dtype=dtype)
        if file:
            # Both are there for a moment.
            folder.expected_bytes += int(checkpoint.bytes / checkpoint.dtype.itemsize * TYPES[options.type].bytes)
        folder.check()
    asked = request(stream, options, dtype, watcher)
    if options.format == "gguf":
        vocabulary(tokenizer, checkpoint.config.vocab_size)
    check_writing(stream, tokenizer, options)
    check_survey(asked, None, survey_file)
    drawn = draw(stream, tokenizer, options, save=save_calibration, dry=dry, watcher=watcher)
    check_survey(asked, drawn.text, survey_file)
    watcher.note(
        f"Opened {checkpoint.source}: {checkpoint.config.model_type}, {len(stream)} blocks, "
        f"{counted(parameter_meter(stream).dense, 1)} parameters, {_name(checkpoint.dtype)}"
    )
    watcher.note(
        f"Calibrating on {options.samples} rows of {options.length} tokens"
        f"{'' if drawn.fitted is None else f', fitting to {len(drawn.fitted):,} others'}, computing on {where}; "
        f"the output is {options.type if options.format == 'gguf' else _name(dtype)}"
    )
    return Job(stream, options, dtype, asked, drawn, begins_with_bos(tokenizer))


def _check_out(out: Path, options: Options, source: Path | None, overwrite: bool) -> None:
    """Refuse an output that cannot be written, or that its name belies."""
    if options.format != "gguf":
        if out.suffix == ".gguf":
            raise SecateurError(f"{out}: a folder is to be written; add --format gguf, or name a folder")
        OutputFolder(out, overwrite=overwrite, source=source).check()
        return
    check_type(options.type)
    if out.suffix != ".gguf":
        raise SecateurError(f"{out}: --format gguf writes a file; let its name end in .gguf")
    check_file(out, overwrite)
    OutputFolder(_beside(out)).check()


def _beside(file: Path) -> Path:
    """The folder that comes before a GGUF file lies beside it, like this one."""
    return file.with_name(f".{file.name}.folder")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
