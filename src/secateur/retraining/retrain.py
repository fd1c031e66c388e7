"""`retrain`: train a pruned folder further, in all weights of its blocks or with merged low-rank adapters (LoRA).

By default the model learns the next-token distributions of the model that was pruned, the teacher; without a teacher it
learns to predict a text. Unlike all other steps, this one holds the whole pruned model in memory, but never the
teacher, which runs block by block from disk before the training starts.
"""

import importlib.util
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from transformers import set_seed

import secateur
from secateur.base.device import fast_dtype, pick_device
from secateur.base.errors import SecateurError, StoppedError
from secateur.base.files import local_path
from secateur.base.hashes import hash_rows
from secateur.base.memory import MemoryBudget
from secateur.base.options import changed_options, command_line, given_or_made
from secateur.base.output import Output
from secateur.base.progress import Silent, Watcher
from secateur.base.run_folder import CHOICE, run_folder_path
from secateur.base.services import Services
from secateur.checkpoints.checkpoint import Checkpoint
from secateur.formats.folder import open_folder
from secateur.model.arena import Arena
from secateur.model.per_layer import model_class
from secateur.model.stream import BlockStream
from secateur.report.folder import check_record
from secateur.retraining.adapters import adapted_layers, entries_trained, largest_rank
from secateur.retraining.memory import MemoryPlan, plan_memory
from secateur.retraining.options import Training
from secateur.retraining.rows import TrainingRows, training_rows
from secateur.retraining.student import Student
from secateur.retraining.targets import Targets, teacher_bytes, teacher_targets
from secateur.retraining.teacher import open_teacher
from secateur.retraining.train import CHECKPOINT_BYTES, train
from secateur.retraining.write import Curve, TrainedWeights, write_retrained
from secateur.steps.open_model import note_leftovers
from secateur.steps.resume import check_row_hashes, library_versions, with_run_folder
from secateur.text.calibration import cached_token_ids
from secateur.write.record import read_record

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Retrained:
    """Result of a retraining."""

    path: Path
    tokens: int
    """Number of tokens that were trained on."""
    adapted: int
    """Number of trained parameters: of the adapters before they were merged, or of all weights of the blocks."""
    curve: Curve
    """Loss of every step, and perplexity on held-out rows before, during and after the training."""

    @property
    def perplexity(self) -> tuple[float, float]:
        """Perplexity on held-out rows before and after the training."""
        return self.curve.perplexities[0][1], self.curve.perplexities[-1][1]

    @property
    def losses(self) -> tuple[float, ...]:
        """Loss of every training step, in nats per token."""
        return tuple(self.curve.losses)

    def plot(self) -> "Figure":
        """Return the loss and the perplexity on held-out rows against tokens, as a figure of matplotlib."""
        from secateur.report.plots import plot_training

        tokens_per_step = self.tokens / max(1, len(self.losses))
        return plot_training(tokens_per_step, self.losses, self.curve.perplexities, self.curve.teacher)


def retrain(
    folder: str | Path,
    out: str | Path,
    training: Training | None = None,
    *,
    device: str = "auto",
    memory: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    trust_remote_code: bool = False,
    watcher: Watcher | None = None,
    **settings: Any,
) -> Retrained:
    """Train a folder that `prune` wrote, and write the result in the same format.

    A training that was stopped is resumed by the same call; until then its state is kept beside `out`.

    Args:
        folder: Folder with config.json, weights and tokenizer.
        out: The new folder; it appears complete or not at all.
        training: Options of the training; alternatively, give its fields by name (`tokens="1M"`, ...).
        device: `auto` for the first GPU if there is one, or `cpu`.
        memory: Most memory that the process may take, on the GPU if it trains there; see
            `secateur.base.memory.parse_memory`.
        overwrite: Whether to replace a model folder at `out`.
        restart: Whether to discard the state of an earlier, stopped training.
        trust_remote_code: Whether the own code of the folder's model, and of the teacher, may run.
        watcher: Receives progress.

    Raises:
        SecateurError: The folder holds no model, the teacher cannot be found or has other sizes, the text or
            the memory is too small, the training diverges, or the output cannot be written.
    """
    training, services = given_or_made(Training, training, settings, "seed=1"), Services.join(watcher)
    check_adapters(training.rank)
    where = pick_device(device)
    checkpoint, target = _open_folder(folder, out, overwrite, services.watcher, trust_remote_code)
    teacher = open_teacher(checkpoint, training.teacher, services.watcher, trust_remote_code=trust_remote_code)
    if teacher is not None:
        Output(target.path, overwrite=overwrite, source=teacher.path).check()
    with ExitStack() as stack:
        # The text is needed several times: for the held-out rows and for the rows to train on.
        stack.enter_context(cached_token_ids())
        inputs = _inputs_of(checkpoint, teacher, training, services)
        services = stack.enter_context(with_run_folder(services, target.path, inputs, restart=restart))
        stack.enter_context(_out_of_device_memory())
        stack.enter_context(_seeded(training.seed))
        plan, trained = _plan_memory(checkpoint, training, where, services, memory)
        training = replace(training, rank=plan.rank)
        services = replace(services, budget=MemoryBudget(plan.spare_bytes))
        student = _load(checkpoint, where, plan, services)
        dense = None if teacher is None else BlockStream(teacher, device=where, services=services)
        tokens = training.token_count
        state_bytes = 2 * CHECKPOINT_BYTES * trained
        if dense is not None:
            state_bytes = teacher_bytes(dense, tokens, plan.spare_bytes, least=state_bytes)
        # Part of the state may be there already.
        state = run_folder_path(target.path)
        replace(target, expected_bytes=checkpoint.bytes + state_bytes, resume_path=state).check()
        rows = _draw(checkpoint, training, tokens, services)
        arena = stack.enter_context(Arena(services.budget, run_folder_path(target.path)))
        student.rows, student.targets = rows.train, Targets(rows.train)
        if dense is not None:
            student.targets = teacher_targets(dense, rows, training.text_weight, arena)
        history = train(
            student,
            training,
            run_folder_path(target.path) / "training",
            held_out=rows.held_out,
            micro_batch=plan.micro_batch,
            services=services,
        )
        weights = TrainedWeights(checkpoint, student, plan.rank)
        curve = Curve.of(history, student.perplexity(rows.held_out), student.targets.held_out_loss)
        if services.processes.is_first:
            command = command_line("retrain", checkpoint.source, changed_options(training))
            write_retrained(checkpoint, target, weights, _record_of(training, plan, curve, rows), command)
        else:
            weights.send()
        # A script may open the output next, in any process.
        services.processes.wait()
    return Retrained(target.path, rows.train.numel(), trained, curve)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the random numbers of Python, NumPy and torch, and restore the caller's afterwards."""
    python, numpy_state = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(numpy_state)


@contextmanager
def _out_of_device_memory() -> Iterator[None]:
    """Turn the error of a device without free memory into one for the user."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise StoppedError(
            "the device is out of memory; add --restart and train adapters with --rank, or use a smaller --length"
        ) from error


def check_adapters(rank: int | None, reason: str = "") -> None:
    """Check that adapters can be trained.

    Args:
        rank: Rank of the adapters; 0 or None if none are asked for.
        reason: Beginning of the message if peft is missing.

    Raises:
        SecateurError: Peft is missing.
    """
    if rank and importlib.util.find_spec("peft") is None:
        raise SecateurError(f'{reason}LoRA retraining needs peft, which is not installed; pip install "secateur[lora]"')


def _open_folder(
    folder: str | Path, out: str | Path, overwrite: bool, watcher: Watcher, trust_remote_code: bool
) -> tuple[Checkpoint, Output]:
    """Open the pruned folder, and check that the new folder can be written."""
    if Path(out).suffix == ".gguf":
        raise SecateurError(f"{out}: retrain writes a folder; name one, then export it with secateur export")
    source = local_path(folder)
    with watcher.busy(f"Opening {folder}"):
        checkpoint = open_folder(source, trust_remote_code=trust_remote_code)
    if checkpoint.multimodal_config is not None:
        raise SecateurError(f"{folder}: retrain cannot train multimodal models; name a language model")
    target = Output(Path(out), overwrite=overwrite, source=checkpoint.path, expected_bytes=checkpoint.bytes)
    target.check()
    note_leftovers(target.path, watcher)
    if "sizes" in read_record(source):
        check_record(source)
    return checkpoint, target


def _plan_memory(
    checkpoint: Checkpoint, training: Training, device: torch.device, services: Services, memory: str | None
) -> tuple[MemoryPlan, int]:
    """Return how a step is run, and the number of trained parameters."""
    processes = services.processes.size
    if training.batch % processes:
        raise SecateurError(f"batch is {training.batch}, which {processes} processes cannot share; use a multiple")
    network = checkpoint.empty(model_class(checkpoint.config))
    if not adapted_layers(network):
        raise SecateurError("no block has heads or channels left, so there is nothing to retrain; prune less")
    if training.rank and training.rank > (largest := largest_rank(network)):
        raise SecateurError(f"rank is {training.rank}, but no matrix has more than {largest}; use a smaller one, or 0")

    def planned(way: Sequence[int] = ()) -> MemoryPlan:
        how: dict[str, Any] = {"processes": processes, "memory": memory, "way": way}
        return plan_memory(checkpoint, network, training, device=device, products=fast_dtype(device), **how)

    # A resumed run goes on as it began, even if less memory is free, and all processes do the same.
    way = services.saved_result(CHOICE, lambda: planned().way)
    plan = planned(services.processes.broadcast(lambda: planned(way).way))
    check_adapters(plan.rank, "" if training.rank else "all weights do not fit into memory, and ")
    services.watcher.note(plan.describe(training, trained := entries_trained(network, plan.rank)))
    return plan, trained


def _load(checkpoint: Checkpoint, device: torch.device, plan: MemoryPlan, services: Services) -> Student:
    """Return the pruned model, ready to be trained."""
    how: dict[str, Any] = {"rank": plan.rank, "halved": plan.halved, "products": fast_dtype(device), "device": device}
    with services.watcher.busy(f"Loading {checkpoint.source}"):
        student = Student(checkpoint, **how, processes=services.processes)
    if plan.recompute:
        student.recompute()
    return student


def _draw(checkpoint: Checkpoint, training: Training, tokens: int, services: Services) -> TrainingRows:
    """Return the rows of the training.

    Raises:
        SecateurError: They are not the rows with which the run began.
    """
    rows = training_rows(checkpoint, training, tokens, services)
    check_row_hashes(services, training.calibration, [hash_rows(rows.train)])
    if rows.passes > 1:
        services.watcher.note(
            f"The text has fewer than the {rows.train.numel():,} tokens to train on, so it is used {rows.passes:,.1f} "
            "times, cut into other rows each time. A model that reads a text several times may get worse at other "
            "texts: name a longer text with --calibration, or use fewer tokens"
        )
    return rows


def _inputs_of(
    checkpoint: Checkpoint, teacher: Checkpoint | None, training: Training, services: Services
) -> dict[str, Any]:
    """Return all inputs of the training, by which its state is recognised."""
    options = {name: value for name, value in asdict(training).items() if name != "teacher"}
    # The held-out rows are the same for every number of tokens.
    quiet = replace(services, watcher=Silent())
    text = training_rows(checkpoint, replace(training, batch=1), training.length, quiet)
    return {
        "command": "retrain",
        **options,
        "model": checkpoint.identity,
        "text": hash_rows(text.held_out),
        "teacher": None if teacher is None else teacher.identity,
        **library_versions(),
    }


def _record_of(training: Training, plan: MemoryPlan, curve: Curve, rows: TrainingRows) -> dict[str, Any]:
    """Return the entry for the list `retrained` of the record secateur.json."""
    return {
        "secateur": secateur.__version__,
        **({"peft": version("peft")} if training.rank else {}),
        "options": asdict(training),
        **({"trained_in": "bfloat16"} if plan.halved else {}),
        "tokens": rows.train.numel(),
        "passes": round(rows.passes, 3),
        "perplexity": {
            "teacher": curve.teacher,
            "before": curve.perplexities[0][1],
            "after": curve.perplexities[-1][1],
        },
        **curve.as_json(),
    }
