"""The retrained folder: a copy of the pruned folder with the trained weights, and the course of the training.

Adapters are added to the stored weights, not to the copies in memory, which may have fewer bits.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.output import Output
from secateur.checkpoints.checkpoint import Checkpoint
from secateur.checkpoints.expert_matrices import whole
from secateur.formats.per_layer import MODELING_FILE
from secateur.model.per_layer import is_per_layer
from secateur.report.folder import readme_and_report
from secateur.retraining.adapters import adapters_of, trained_parameters
from secateur.retraining.shares import gathered, set_share
from secateur.retraining.student import Student
from secateur.write.files import copy_into, write_json, write_text_or_json
from secateur.write.record import MAP_FILE, RECORD, read_record
from secateur.write.shards import ShardWriter, header_bytes_for


@dataclass(frozen=True)
class Curve:
    """Loss of every step, and perplexity on held-out rows before, during and after the training."""

    losses: tuple[float, ...]
    """Loss of every step, in nats per token."""
    perplexities: tuple[tuple[int, float], ...]
    """Number of steps done and perplexity on held-out rows; the first is before the training, the last after it."""
    teacher: float | None
    """Perplexity of the teacher on the same rows; None where there is no teacher."""

    @classmethod
    def of(cls, history: list[dict[str, Any]], after: float, teacher_loss: float | None) -> "Curve":
        """Return the course of a training.

        Args:
            history: Entries that `train` returns: `loss` or `held_out`, each with `step`.
            after: Perplexity of the weights as they are written.
            teacher_loss: Loss of the teacher on held-out rows, in nats per token.
        """
        losses = tuple(entry["loss"] for entry in history if "loss" in entry)
        measured = [(entry["step"], entry["held_out"]) for entry in history if "held_out" in entry]
        points = (*(point for point in measured if point[0] < len(losses)), (len(losses), after))
        return cls(losses, points, None if teacher_loss is None else math.exp(teacher_loss))

    def as_json(self) -> dict[str, Any]:
        """Return the course as the record secateur.json holds it."""
        return {
            "losses": [round(loss, 5) for loss in self.losses],
            "perplexities": [[step, round(value, 5)] for step, value in self.perplexities],
        }


class TrainedWeights:
    """Trained tensors by their stored names, in the stored dtype. Adapters are taken out of the network."""

    def __init__(self, checkpoint: Checkpoint, student: Student, rank: int):
        """Merge the adapters, and put the weights into the network as they are written.

        Raises:
            SecateurError: A weight is NaN or infinite.
        """
        self._checkpoint, self._network, self._student = checkpoint, student.network, student
        # Pieces of the few parameters that hold a block's experts alternate in the file.
        self._pieces = lru_cache(maxsize=4)(self._pieces_of)
        self._adapters = adapters_of(student.network) if rank else {}
        if rank:
            student.adapted.unload()
        names = trained_parameters(self._network, rank)
        self._owners = {stored: name for name in names for stored in checkpoint.pieces(name)}
        for name in names:
            value = self._whole(name)
            if not torch.isfinite(value.sum()):
                raise SecateurError(f"{name}: NaN or infinite after the training; use a smaller --learning-rate")
            set_share(self._network.get_parameter(name).data, value)

    def __contains__(self, stored: str) -> bool:
        return stored in self._owners

    def __getitem__(self, stored: str) -> Tensor:
        """Return a tensor by its stored name."""
        return self._pieces(self._owners[stored])[stored].to(self._checkpoint.tensors[stored].dtype)

    def send(self) -> None:
        """Send this process's shares to the process that writes."""
        for stored in self._checkpoint.tensors:
            if stored in self:
                self[stored]

    def _pieces_of(self, name: str) -> dict[str, Tensor]:
        """Return a parameter by stored names: its pieces, if the matrices of experts are stored one by one."""
        return {stored: whole(part) for stored, part in self._checkpoint.split(name, self._whole(name))}

    def _whole(self, name: str) -> Tensor:
        """Return a trained parameter, rounded to the stored dtype; an adapter is added to the stored matrix."""
        stored = self._checkpoint.parameter(name)
        if name not in self._adapters:
            return gathered(self._network.get_parameter(name).data).to(stored.dtype)
        weight = stored.read()
        with self._student.whole(name):
            delta = self._adapters[name].get_delta_weight("default").detach().to("cpu", torch.float32)
        return (weight.float() + delta.view(weight.shape)).to(weight.dtype)


def write_retrained(
    checkpoint: Checkpoint, target: Output, weights: TrainedWeights, entry: dict[str, Any], command: str
) -> None:
    """Write the folder.

    Args:
        checkpoint: The pruned folder.
        target: The new folder.
        weights: The trained tensors.
        entry: Entry for the list `retrained` of the record secateur.json.
        command: The command of the training.
    """
    source = checkpoint.path
    with target as partial:
        writer = ShardWriter(partial, header_bytes=header_bytes_for(checkpoint.tensors))
        for name in checkpoint.tensors:
            writer.add(name, weights[name] if name in weights else checkpoint.read(name))
        writer.close()
        more = [source / MODELING_FILE.name] if is_per_layer(checkpoint.config) else []
        more += [file for file in [source / MAP_FILE] if file.is_file()]
        write_json(partial / "config.json", checkpoint.raw_config)
        for file in (*checkpoint.files, *more):
            copy_into(partial, file)
        record = read_record(source)
        record["retrained"] = [*record.get("retrained", []), entry]
        record["later"] = [*record.get("later", []), command]
        write_json(partial / RECORD, record)
        # A folder that another tool saved has no record, of which the model card is made.
        files = readme_and_report(source, lambda: record) if "sizes" in record else {}
        for name, contents in files.items():
            write_text_or_json(partial / name, contents)
