"""`retrain`: a pruned folder trained on, by low-rank adapters (LoRA) that are merged, or in all weights of its blocks.

The model learns a text, the step after pruning in LLM-Pruner (Ma et al., 2023), whose rank, scale, dropout and learning
rate are the defaults here; or with a teacher, what the dense model makes of that text. Unlike all other steps, this one
holds the whole model in memory.
"""

import importlib.util
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

import secateur
from secateur.base.device import pick_device
from secateur.base.errors import SecateurError
from secateur.base.files import local_path
from secateur.base.hashes import hash_rows
from secateur.base.output import Output
from secateur.base.progress import Silent, Watcher, busy_reading
from secateur.base.run_folder import RunFolder
from secateur.formats.folder import open_folder
from secateur.measure import loading, perplexity
from secateur.model.checkpoint import Checkpoint
from secateur.report.folder import check_record
from secateur.retraining.adapters import adapted_layers, trained
from secateur.retraining.options import Training
from secateur.retraining.teacher import open_teacher
from secateur.retraining.train import train
from secateur.retraining.write import write_retrained
from secateur.text.calibration import SampleOption, calibration_rows
from secateur.write.record import read_record

HELD_OUT = 16
"""Rows of the same text that are not trained on, to measure perplexity before and after."""


@dataclass(frozen=True)
class Retrained:
    """Result of a retraining."""

    path: Path
    perplexity: tuple[float, float]
    """Perplexity on held-out rows before and after, both of the weights as they are stored."""
    losses: tuple[float, ...]
    """Loss of every step, in nats per token."""
    adapted: int
    """Parameters that were trained: those of the adapters, which are merged, or all of the blocks."""


def retrain(
    folder: str | Path,
    out: str | Path,
    training: Training | None = None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    restart: bool = False,
    watcher: Watcher | None = None,
    **settings: Any,
) -> Retrained:
    """Train a folder that `prune` wrote, and write the result in the same format.

    A training that is killed is resumed when `retrain` is called again: its state stands beside `out` meanwhile.

    Args:
        folder: with config.json, weights and tokenizer.
        out: the new folder; it appears complete or not at all.
        training: how to train; or give any of its fields by name (`epochs=1`, ...).
        device: `auto`, where the Trainer takes a GPU if there is one, or `cpu`.
        overwrite: replace a model folder that is at `out`.
        restart: begin anew where an earlier training was stopped.
        watcher: told about progress.

    Raises:
        SecateurError: peft is missing, the folder is no model's, the teacher does not fit it, the text is too
            short, another training was begun there, the training diverges, or the output cannot be written.
    """
    training, watcher = training or Training(**settings), watcher or Silent()
    check_retraining(device, training.rank)
    where = pick_device(device)
    checkpoint, target = _opened(folder, out, overwrite, watcher)
    teacher = None if training.teacher is None else open_teacher(checkpoint, training.teacher, watcher)
    rows = training_rows(checkpoint, training, watcher)
    fitted, held_out = rows[: training.samples], rows[training.samples :]
    network = _loaded(checkpoint, str(folder), where, watcher)
    if not adapted_layers(network):
        raise SecateurError("no block has heads or channels left, so there is nothing to retrain")
    dense = None if teacher is None else _loaded(teacher, str(training.teacher), where, watcher)
    before = perplexity(network, held_out).perplexity
    with RunFolder(target.path, _decided_by(checkpoint, teacher, training, rows), restart=restart) as state:
        with torch.random.fork_rng():
            set_seed(training.seed)
            losses, adapted = train(network, dense, fitted, training, where, state.folder("training"), watcher)
        del dense
        changed = _rounded(network, training.rank, checkpoint.dtype)
        after = perplexity(network, held_out).perplexity
        entry = {
            "secateur": secateur.__version__,
            **({"peft": version("peft")} if training.rank else {}),
            "options": asdict(training),
            "steps": len(losses),
            "perplexity": {"before": before, "after": after},
        }
        write_retrained(checkpoint, target, changed, entry)
    return Retrained(target.path, (before, after), losses, adapted)


def check_retraining(device: str, rank: int = 1) -> None:
    """Check what can be found wrong without a model.

    Raises:
        SecateurError: peft is missing, or the Trainer does not take the device.
    """
    if rank and importlib.util.find_spec("peft") is None:
        raise SecateurError('LoRA retraining needs peft, which is not installed; pip install "secateur[lora]"')
    if device not in ("auto", "cpu"):
        raise SecateurError(f"device is '{device}', but the Trainer takes the first GPU itself; use auto or cpu")


def training_rows(checkpoint: Checkpoint, training: Training, watcher: Watcher) -> Tensor:
    """Return the rows of a training (rows x length), of which the last `HELD_OUT` are not trained on.

    Raises:
        SecateurError: the text cannot be read or is too short.
    """
    with busy_reading(watcher, "Reading", training.calibration):
        return calibration_rows(
            checkpoint.tokenizer(),
            training.calibration,
            samples=training.samples + HELD_OUT,
            length=training.length,
            seed=training.seed,
            vocab_size=checkpoint.config.vocab_size,
            max_positions=checkpoint.max_positions,
            option=SampleOption(extra_rows=HELD_OUT),
        )


def _opened(folder: str | Path, out: str | Path, overwrite: bool, watcher: Watcher) -> tuple[Checkpoint, Output]:
    """Open the pruned folder, and check that the new one can be written."""
    if Path(out).suffix == ".gguf":
        raise SecateurError(f"{out}: a folder is to be written; name a folder, then secateur export it")
    source = local_path(folder)
    with watcher.busy(f"Opening {folder}"):
        checkpoint = open_folder(source)
    if checkpoint.around is not None:
        raise SecateurError(f"{folder}: a multimodal model; retrain takes language models alone")
    target = Output(Path(out), overwrite=overwrite, source=checkpoint.path, expected_bytes=checkpoint.bytes)
    target.check()
    if "sizes" in read_record(source):
        check_record(source)
    return checkpoint, target


def _loaded(checkpoint: Checkpoint, name: str, device: torch.device, watcher: Watcher) -> Any:
    """Load a whole model in float32."""
    with watcher.busy(f"Loading {name}"):
        return loading.load(checkpoint, torch.float32, device, whole=True)


def _decided_by(checkpoint: Checkpoint, teacher: Checkpoint | None, training: Training, rows: Tensor) -> dict[str, Any]:
    """Return everything that decides the result, so that no other training is resumed from its state."""
    options = {name: value for name, value in asdict(training).items() if name != "teacher"}
    inputs = {"model": checkpoint.fingerprint, "text": hash_rows(rows), "version": secateur.__version__}
    return options | inputs | {"teacher": None if teacher is None else teacher.fingerprint}


def _rounded(network: Any, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Round the trained weights in place to the stored dtype, and return them by name.

    Raises:
        SecateurError: a weight is NaN or infinite.
    """
    changed: dict[str, Tensor] = {}
    for name in trained(network, rank):
        weight = network.get_parameter(name).data
        # What is measured is what will be loaded.
        changed[name] = weight.copy_(weight.to(dtype))
        if not torch.isfinite(weight.sum()):
            raise SecateurError(f"{name}: NaN or infinite after the training; take a smaller learning rate")
    return changed
