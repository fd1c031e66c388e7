"""A pruned model opened as transformers opens it, on the meta device: config.json must describe the stored tensors.

A family's entry is checked so ahead of the work, and every folder before it appears.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from secateur.base.errors import SecateurError
from secateur.base.quiet import quiet
from secateur.formats.per_layer import decoder_class
from secateur.model.checkpoint import Checkpoint, open_checkpoint
from secateur.model.stream import BlockStream
from secateur.model.structure import KeptUnits
from secateur.model.surgery import slice_block
from secateur.model.weights import TensorInfo


def check_written(folder: Path, out: Path, advice: str) -> None:
    """Check that a folder opens, which is to take the place of `out`; of a multimodal one, the language model alone.

    Raises:
        SecateurError: it does not, with the advice.
    """
    try:
        why = _misfit(open_checkpoint(folder))
    except SecateurError as error:
        # What it ends in is for a model that was downloaded.
        why = str(error).replace(f"{folder}/", "").replace(f"{folder}: ", "").rpartition("; ")[0]
    if why is not None:
        raise SecateurError(f"{out}: transformers does not open what was made, so it was removed ({why}); {advice}")


def planned_misfit(stream: BlockStream, keeps: Mapping[int, KeptUnits], raw_config: dict[str, Any]) -> str | None:
    """Return how config.json would differ from a model with these units, as a clause; None where it describes it."""
    with quiet():
        config = CONFIG_MAPPING[raw_config["model_type"]].from_dict(raw_config)
    return _misfit(replace(stream.checkpoint, config=config, raw_config=raw_config, tensors=_cut(stream, keeps)))


def _misfit(checkpoint: Checkpoint) -> str | None:
    with quiet():
        return checkpoint.misfit(checkpoint.empty(decoder_class(checkpoint.config, checkpoint.around)))


def _cut(stream: BlockStream, keeps: Mapping[int, KeptUnits]) -> dict[str, TensorInfo]:
    """Return the tensors that will be stored, of which only the shapes are true."""
    tensors = dict(stream.checkpoint.weights)
    for index, keep in keeps.items():
        block = stream.blocks[index]
        dense = {name: torch.empty(shape, device="meta") for name, shape in block.shapes.items()}
        names = [name for whole in dense for name in stream.stored_names(index, whole)]
        before = {name: tensors.pop(name) for name in names}
        for whole, tensor in slice_block(block, dense, keep).items():
            for name, part in stream.as_stored(index, whole, tensor).items():
                tensors[name] = replace(before[name], shape=tuple(part.shape))
    return tensors
