"""Importances of the columns of matrices, by which llama.cpp's library rounds them: mean squares of a layer's inputs.

They are what llama.cpp calls an importance matrix. A stand-in for the model has mean squares in place of its weights.
It is converted as the model is, so that layers that a file splits, fuses or reorders need no code here.
"""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secateur.base.device import pick_device
from secateur.base.errors import SecateurError
from secateur.base.files import local_path
from secateur.base.progress import Watcher, busy_reading
from secateur.base.services import Services
from secateur.checkpoints.checkpoint import Checkpoint
from secateur.checkpoints.weights import InMemory, TensorInfo
from secateur.gguf.architectures import choose_architecture
from secateur.gguf.model import GgufModel
from secateur.gguf.tensors import file_tensors
from secateur.model.experts import Experts
from secateur.model.per_layer import widths_of
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.text.calibration import calibration_rows

Importance = Mapping[str, Tensor]
"""Importances by llama.cpp's name of a matrix, float32: one for each column; of experts, expert after expert."""
ROWS, LENGTH = 128, 128
"""Number and length of the rows of text on which importances are measured."""
_SUMS, _COUNTS = ".in_sum2", ".counts"


def importance_rows(checkpoint: Checkpoint, source: str, watcher: Watcher) -> Tensor:
    """Draw the rows on which importances are measured (rows x tokens).

    Args:
        checkpoint: The model.
        source: A source of text as for `prune`.
        watcher: Shows the progress.

    Raises:
        SecateurError: The text cannot be read or is too short.
    """
    length = min(LENGTH, checkpoint.max_positions or LENGTH)
    with busy_reading(watcher, "Reading", source):
        return calibration_rows(
            checkpoint.tokenizer(),
            source,
            samples=ROWS,
            length=length,
            seed=0,
            vocab_size=checkpoint.config.vocab_size,
            to_train=True,
        )


@dataclass
class _MeanSquares:
    """Mean squares of the inputs of a block's layers, by the names of their weights inside the block."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    """Sums of squares, float32."""
    counts: dict[str, int] = field(default_factory=dict)
    """Number of tokens."""

    def add(self, name: str, inputs: Tensor, _: Tensor | None = None) -> None:
        """Add the inputs of a layer (... x columns)."""
        squares = inputs.detach().float().flatten(0, -2).square()
        self.sums[name] = self.sums.get(name, 0.0) + squares.sum(dim=0).cpu()
        self.counts[name] = self.counts.get(name, 0) + len(squares)

    def of(self, name: str, columns: int) -> Tensor:
        """Return the mean squares of a layer's inputs (columns); ones if no token reached it, or all were zero."""
        total = self.sums.get(name)
        return torch.ones(columns) if total is None or not total.any() else total / self.counts[name]

    def watch(self, layer: nn.Module) -> dict[str, Callable[[Tensor, Tensor], None]]:
        """Return functions that add the inputs of a block's layers, by path; experts call them themselves."""
        for path, module in layer.named_modules():
            if isinstance(module, Experts):
                module.see = lambda leaf, number, x, path=path: self.add(f"{path}.{leaf}.{number}", x)
        linear = (path for path, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D))
        return {path: partial(self.add, f"{path}.weight") for path in linear}

    def in_place_of_weights(self, layer: nn.Module) -> dict[str, Tensor]:
        """Return tensors of the shapes of a block's weights in which every row is the mean squares of the inputs."""
        result = dict[str, Tensor]()
        for path, module in layer.named_modules():
            if isinstance(module, nn.Linear | Conv1D) and f"{path}.weight" in self.sums:
                inputs_first, shape = isinstance(module, Conv1D), module.weight.shape
                mean = self.of(f"{path}.weight", shape[0 if inputs_first else 1])
                result[f"{path}.weight"] = (mean[:, None] if inputs_first else mean).expand(shape)
            if isinstance(module, Experts):
                for leaf in ("gate_up_proj", "down_proj"):
                    shape = torch.Size(getattr(module, leaf).shape)
                    inputs, outputs = (1, 2) if module.layout.inputs_first else (2, 1)
                    means = [self.of(f"{path}.{leaf}.{number}", shape[inputs]) for number in range(shape[0])]
                    result[f"{path}.{leaf}"] = torch.stack(means).unsqueeze(outputs).expand(shape)
        return result


def measured(checkpoint: Checkpoint, watcher: Watcher, *, rows: Tensor, device: str) -> Importance:
    """Measure importances in one forward pass, block by block.

    Args:
        checkpoint: The model.
        watcher: Shows the progress.
        rows: Result of `importance_rows`.
        device: Device to compute on; `auto` for a GPU if there is one.

    Raises:
        SecateurError: The model gives no finite activations.
    """
    stream = BlockStream(checkpoint, device=pick_device(device), services=Services(watcher=watcher))
    stand_in, local = copy(checkpoint), stream.local_rows(Rows.of(rows))
    stand_in.tensors = {name: _expanded(info, torch.tensor(torch.nan)) for name, info in checkpoint.tensors.items()}
    with torch.inference_mode(), stream.arena() as arena, stream.fast_products():
        hidden = stream.embed(local, arena)
        for index in watcher.track(range(len(stream)), "Importances of block"):
            with stream.filled(index) as layer:
                means = _MeanSquares()
                watch = means.watch(layer)
                for at in local.batches():
                    hidden[at] = stream.run_through(index, layer, hidden[at], at.group, watch=watch)
                for name, values in means.in_place_of_weights(layer).items():
                    _put(stand_in, f"{stream.family.blocks}.{index}.{name}", values)
    model = GgufModel(stand_in, widths_of(checkpoint.config))
    result = dict[str, Tensor]()
    for tensor in file_tensors(model, choose_architecture(model)):
        if len(tensor.values.shape) > 1 and not (values := tensor.values.compute().float()).isnan().any():
            result[tensor.name] = values.abs().amax(dim=-2).flatten()
    return result


def _expanded(info: TensorInfo, values: Tensor) -> TensorInfo:
    """Return a tensor of a stored tensor's shape with values that are repeated without taking memory."""
    return InMemory(info.shape, values.dtype, values=values.expand(info.shape))


def _put(checkpoint: Checkpoint, name: str, values: Tensor) -> None:
    """Put values in place of a parameter, or of its pieces."""
    pieces = checkpoint.pieces(name)
    parts = [values]
    if len(pieces) > 1:
        parts = [part for joined in values for part in joined.chunk(checkpoint.matrices_per_expert(name))]
    for piece, part in zip(pieces, parts, strict=True):
        checkpoint.tensors[piece] = _expanded(checkpoint.tensors[piece], part)


def read_importance(file: str | Path) -> Importance:
    """Read an importance matrix that llama.cpp's llama-imatrix wrote as a GGUF file.

    Raises:
        SecateurError: The file does not exist, or is no such file.
    """
    path = local_path(file)
    if not path.is_file():
        raise SecateurError(f"{file}: no such file; llama-imatrix writes one")
    try:
        tensors = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}
    except Exception as error:
        # The reader maps the file into memory, and fails in many ways when something is missing.
        raise SecateurError(
            f"{file}: not a GGUF file; let llama-imatrix write it again as .gguf (older releases wrote .dat)"
        ) from error
    result = dict[str, Tensor]()
    for name, sums in tensors.items():
        if name.endswith(_SUMS) and (counts := tensors.get(name.removesuffix(_SUMS) + _COUNTS)) is not None:
            mean = torch.from_numpy(sums).float() / torch.from_numpy(counts).float().reshape(-1, 1).clamp(min=1)
            # An expert that no token reached has equal importances.
            mean[mean.sum(dim=-1) == 0] = 1.0
            result[name.removesuffix(_SUMS)] = mean.flatten()
    if not result:
        raise SecateurError(f"{file}: not an importance matrix; let llama-imatrix write one")
    return result
