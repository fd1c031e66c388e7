"""`retrain`: a pruned folder trained on, by low-rank adapters (LoRA) that are merged, or in all weights of its blocks.

It learns a text, the step after pruning in LLM-Pruner (Ma et al., 2023), whose rank, scale, dropout and learning rate
are the defaults here; or with a teacher, what the dense model makes of that text. Only this step and
`survey/gradients.py` have a backward pass; unlike all others, this one holds the whole model in memory.
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
from secateur.base.files import Output, hash_of, local_path
from secateur.base.progress import Silent, Watcher, reading
from secateur.base.run_folder import RunFolder
from secateur.compare.train import adapted_layers, train, trained
from secateur.compare.training import Training
from secateur.formats.per_layer import MODELING_FILE, is_per_layer
from secateur.measure import compare, perplexity
from secateur.model.checkpoint import Checkpoint, open_checkpoint
from secateur.report.card import BASE_CARD
from secateur.report.folder import check_described, described, text_of
from secateur.text.calibration import calibration_rows
from secateur.write.export import open_folder
from secateur.write.record import RECORD, record_of
from secateur.write.shards import ShardWriter, header_room
from secateur.write.write import copy_into, write_json, write_record

HELD_OUT = 16
"""Rows of the same text that are not trained on, to measure perplexity before and after."""


@dataclass(frozen=True)
class Retrained:
    """What came of it."""

    path: Path
    perplexity: tuple[float, float]
    """On rows of the same text that were not trained on, before and after; both as written."""
    losses: tuple[float, ...]
    """Of every step, in nats per token."""
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

    A training that is killed goes on where it was when it is called again: its state stands beside `out` meanwhile.

    Args:
        folder: with config.json, weights and tokenizer.
        out: the new folder; it appears complete or not at all.
        training: how; or give any of its fields by name (`epochs=1`, ...).
        device: `auto`, where the Trainer takes a GPU if there is one, or `cpu`.
        overwrite: replace a model folder that is at `out`.
        restart: begin anew where an earlier training was stopped.

    Raises:
        SecateurError: peft is missing, the folder is no model's, the teacher does not fit it, the text is too
            short, another training was begun there, the training diverges, or the output cannot be written.
    """
    training, watcher = training or Training(**settings), watcher or Silent()
    check_retraining(device, training.rank)
    if Path(out).suffix == ".gguf":
        raise SecateurError(f"{out}: a folder is to be written; name a folder, then secateur export it")
    where = pick_device(device)
    source = local_path(folder)
    with watcher.busy(f"Opening {folder}"):
        checkpoint = open_folder(source)
    if checkpoint.around is not None:
        raise SecateurError(f"{folder}: a multimodal model; retrain takes language models alone")
    target = Output(Path(out), overwrite=overwrite, source=checkpoint.path, expected_bytes=checkpoint.bytes)
    target.check()
    if "sizes" in record_of(source):
        check_described(source)
    teacher = None if training.teacher is None else _opened_teacher(checkpoint, training.teacher, watcher)
    rows = training_rows(checkpoint, training, watcher)
    fitted, held_out = rows[: training.samples], rows[training.samples :]
    asked = {name: value for name, value in asdict(training).items() if name != "teacher"}
    asked |= {"model": checkpoint.fingerprint, "text": hash_of(rows), "version": secateur.__version__}
    asked["teacher"] = None if teacher is None else teacher.fingerprint
    with watcher.busy(f"Loading {folder}"):
        network = compare.load(checkpoint, torch.float32, where, whole=True)
    if not adapted_layers(network):
        raise SecateurError("no block has heads or channels left, so there is nothing to retrain")
    dense = None
    if teacher is not None:
        with watcher.busy(f"Loading {training.teacher}"):
            dense = compare.load(teacher, torch.float32, where, whole=True)
    before = perplexity(network, held_out).perplexity
    with RunFolder(target.path, asked, restart=restart) as state:
        with torch.random.fork_rng():
            set_seed(training.seed)
            losses, adapted = train(network, dense, fitted, training, where, state.folder("training"), watcher)
        del dense
        changed: dict[str, Tensor] = {}
        for name in trained(network, training.rank):
            weight = network.get_parameter(name).data
            # What is measured is what will be loaded.
            changed[name] = weight.copy_(weight.to(checkpoint.dtype))
            if not torch.isfinite(weight.sum()):
                raise SecateurError(f"{name}: NaN or infinite after the training; take a smaller learning rate")
        after = perplexity(network, held_out).perplexity
        said = {
            "secateur": secateur.__version__,
            **({"peft": version("peft")} if training.rank else {}),
            "options": asdict(training),
            "steps": len(losses),
            "perplexity": {"before": before, "after": after},
        }
        _write(checkpoint, target, changed, said)
    return Retrained(target.path, (before, after), losses, adapted)


def _opened_teacher(checkpoint: Checkpoint, source: str, watcher: Watcher) -> Checkpoint:
    """The dense model, which must have the pruned one's vocabulary, width and depth."""
    with watcher.busy(f"Opening {source}"):
        teacher = open_checkpoint(source)
    for what in ("vocab_size", "hidden_size", "num_hidden_layers"):
        mine, dense = (getattr(one.config, what, None) for one in (checkpoint, teacher))
        if mine != dense:
            raise SecateurError(
                f"{source} has {what} {dense}, but {checkpoint.source} has {mine}: name what that was pruned from"
            )
    return teacher


def check_retraining(device: str, rank: int = 1) -> None:
    """What can be found wrong without a model.

    Raises:
        SecateurError: peft is missing, or the Trainer does not take the device.
    """
    if rank and importlib.util.find_spec("peft") is None:
        raise SecateurError('LoRA retraining needs peft, which is not installed; pip install "secateur[lora]"')
    if device not in ("auto", "cpu"):
        raise SecateurError(f"device is '{device}', but the Trainer takes the first GPU itself; use auto or cpu")


def training_rows(checkpoint: Checkpoint, training: Training, watcher: Watcher) -> Tensor:
    """The rows of a training (rows x length); the last `HELD_OUT` are not trained on.

    Raises:
        SecateurError: the text cannot be read or is too short.
    """
    with reading(watcher, "Reading", training.calibration):
        return calibration_rows(
            checkpoint.tokenizer(),
            training.calibration,
            samples=training.samples + HELD_OUT,
            length=training.length,
            seed=training.seed,
            vocab_size=checkpoint.config.vocab_size,
            max_positions=checkpoint.max_positions,
            taken=HELD_OUT,
        )


def _write(checkpoint: Checkpoint, target: Output, changed: dict[str, Tensor], said: dict[str, Any]) -> None:
    """The folder once more, with other values for some tensors, and `said` of it in the record."""
    # Experts may be stored one by one.
    stored = {piece: part for name, weight in changed.items() for piece, part in checkpoint.split(name, weight).items()}
    source = checkpoint.path
    with target as partial:
        writer = ShardWriter(partial, header_bytes=header_room(checkpoint.tensors))
        for name, info in checkpoint.tensors.items():
            writer.add(name, stored[name].to(info.dtype) if name in stored else checkpoint.read(name))
        writer.close()
        modeling = [MODELING_FILE] if is_per_layer(checkpoint.config) else []
        write_json(partial / "config.json", checkpoint.raw_config)
        for file in (*checkpoint.files, *modeling):
            copy_into(partial, file)
        record = record_of(source)
        record["retrained"] = [*record.get("retrained", []), said]
        write_json(partial / RECORD, record)
        # What another tool has saved has no record to be described by.
        files = described(text_of(source / BASE_CARD), lambda: record) if "sizes" in record else {}
        for name, contents in files.items():
            write_record(partial / name, contents)
