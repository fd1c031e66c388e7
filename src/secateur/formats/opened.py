"""Check that transformers opens a pruned model: that its config.json describes the tensors that are stored.

The model is opened on the meta device, without weights. Every folder is checked before it gets its final name. A
family's entry from a user's file is checked before any work.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.quiet import quiet
from secateur.checkpoints.checkpoint import Checkpoint, open_checkpoint
from secateur.checkpoints.config_file import TEXT, config_of, made_by
from secateur.checkpoints.weights import TensorInfo
from secateur.model.per_layer import empty_decoder, model_class
from secateur.model.stream import BlockStream
from secateur.model.structure import KeptUnits
from secateur.model.surgery import slice_block


def check_written(folder: Path, out: Path, advice: str, trust_remote_code: bool) -> None:
    """Check that transformers opens a folder; only the language model of a multimodal model is opened.

    Args:
        folder: The folder, which still has a hidden name.
        out: The name that it will get.
        advice: End of the error message: what the user can do.
        trust_remote_code: Whether the model's own code may run.

    Raises:
        SecateurError: The folder does not open.
    """
    try:
        why = _misfit(open_checkpoint(folder, trust_remote_code=trust_remote_code))
    except SecateurError as error:
        # The advice in this error is for models that were downloaded.
        why = str(error).replace(f"{folder}/", "").replace(f"{folder}: ", "").rpartition("; ")[0]
    if why is not None:
        raise SecateurError(f"{out}: transformers cannot open the written model, so it was deleted ({why}); {advice}")


def planned_misfit(stream: BlockStream, keeps: Mapping[int, KeptUnits], raw_config: dict[str, Any]) -> str | None:
    """Return how a config.json differs from the tensors of a pruned model, as a clause; None if it describes them.

    Args:
        stream: The dense model.
        keeps: Units that blocks keep, by block.
        raw_config: Contents of config.json.
    """
    config = config_of(raw_config)
    tensors = _pruned_tensors(stream, keeps)
    return _misfit(replace(stream.checkpoint, config=config, raw_config=raw_config, tensors=tensors))


def network_of(raw_config: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """Return the model of a config.json with some tensors, in evaluation mode.

    Args:
        raw_config: Contents of config.json.
        tensors: All tensors by name.
        dtype: Dtype of the model.

    Raises:
        SecateurError: Tensors are missing, or do not fit the model's class.
    """
    config = config_of(raw_config)
    with quiet():
        auto = model_class(config, raw_config if raw_config.get(TEXT) else None)
        network, info = made_by(auto, config).from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
    if wrong:
        raise SecateurError(
            f"transformers cannot build the pruned model: {wrong[0]} does not fit; report this as a bug"
        )
    # It would be the word None.
    network.name_or_path = network.config.name_or_path = ""
    return network.eval()


def _misfit(checkpoint: Checkpoint) -> str | None:
    """Return how a checkpoint's config differs from its tensors, as a clause; None if it does not."""
    with quiet():
        return checkpoint.difference_from(empty_decoder(checkpoint))


def _pruned_tensors(stream: BlockStream, keeps: Mapping[int, KeptUnits]) -> dict[str, TensorInfo]:
    """Return the tensors that a pruned model stores; only their shapes are valid."""
    tensors = dict(stream.checkpoint.weights)
    for index, keep in keeps.items():
        block = stream.blocks[index]
        dense = {name: torch.empty(shape, device="meta") for name, shape in block.shapes.items()}
        stored = [stored for name in dense for stored in stream.pieces(index, name)]
        before = {name: tensors.pop(name) for name in stored}
        for name, tensor in slice_block(block, dense, keep).items():
            for piece, part in stream.split(index, name, tensor):
                tensors[piece] = replace(before[piece], shape=tuple(part.shape))
    return tensors
