"""Names of stored tensors for which transformers has other names, by transformers' own list of conversions."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from secateur.checkpoints.weights import Computed, TensorInfo


def renamed(tensors: Mapping[str, TensorInfo], kind: str) -> dict[str, TensorInfo]:
    """Return the tensors of a checkpoint by transformers' names. Tensors that transformers joins are joined.

    Matrices that are stored expert by expert keep names of their own; see `matrices_of_experts`.

    Args:
        tensors: Stored tensors by stored name.
        kind: The `model_type` in config.json.
    """
    conversions = get_checkpoint_conversion_mapping(kind) or []
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        for conversion in conversions:
            if isinstance(conversion, WeightRenaming):
                name = conversion.rename_source_key(name)[0]
        found[name] = info
    for conversion in conversions:
        operations = getattr(conversion, "operations", [])
        if len(operations) == 1 and isinstance(operations[0], Concatenate):
            found = _joined(found, conversion.source_patterns, conversion.target_patterns[0])
    return found


def _joined(tensors: Mapping[str, TensorInfo], sources: list[str], target: str) -> dict[str, TensorInfo]:
    """Return tensors in which some, one after the other along their first axis, are one tensor."""
    found = dict(tensors)
    for name in [name for name in tensors if name.endswith(sources[0])]:
        names = [name.removesuffix(sources[0]) + source for source in sources]
        if all(part in tensors for part in names):
            parts = tuple(found.pop(part) for part in names)
            shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
            joined = Computed(shape, parts[0].dtype, sources=parts, compute=lambda *values: torch.cat(values))
            found[name.removesuffix(sources[0]) + target] = joined
    return found


def matrices_of_experts(kind: str) -> dict[str, tuple[str, ...]]:
    """Return the names of the matrices that checkpoints store for each expert, by the tensor that joins them."""
    return {
        conversion.target_patterns[0].rpartition(".")[2]: tuple(
            source.replace("\\", "").rpartition(".*.")[2].removesuffix(".weight") for source in conversion.source_patterns
        )
        for conversion in get_checkpoint_conversion_mapping(kind) or []
        if isinstance(conversion, WeightConverter)
        and any(isinstance(operation, MergeModulelist) for operation in conversion.operations)
    }
