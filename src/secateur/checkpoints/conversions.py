"""Names of stored tensors for which transformers has other names, by transformers' own list of conversions."""

from collections.abc import Callable, Mapping

import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from secateur.checkpoints.weights import Computed, OneByOne, TensorInfo


def converted(
    tensors: Mapping[str, TensorInfo], kind: str, joins_experts: Callable[[], bool]
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return the tensors of a checkpoint, and the names under which they are stored by transformers' names.

    Tensors that transformers joins are joined, and have transformers' names.

    Args:
        tensors: Stored tensors by stored name.
        kind: The `model_type` in config.json.
        joins_experts: Function that returns whether matrices that are stored expert by expert are joined too; else
            they keep names of their own, see `matrices_of_experts`.
    """
    conversions = get_checkpoint_conversion_mapping(kind) or []
    stored: dict[str, str] = {}
    for old in tensors:
        name = old
        for conversion in conversions:
            if isinstance(conversion, WeightRenaming):
                name = conversion.rename_source_key(name)[0]
        stored[name] = old
    found = {name: tensors[old] for name, old in stored.items()}
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    for conversion in converters if converters and joins_experts() else ():
        found = _stacked(found, conversion)
    for conversion in conversions:
        operations = getattr(conversion, "operations", [])
        if len(operations) == 1 and isinstance(operations[0], Concatenate):
            found = _joined(found, conversion.source_patterns, conversion.target_patterns[0])
    return {stored.get(name, name): info for name, info in found.items()}, {
        name: old for name, old in stored.items() if name != old and name in found
    }


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


def _stacked(tensors: Mapping[str, TensorInfo], conversion: WeightConverter) -> dict[str, TensorInfo]:
    """Return tensors in which the matrices of a block's experts are one tensor, as a conversion joins them."""
    found = dict(tensors)
    sources = [source.replace("\\", "").partition(".*.") for source in conversion.source_patterns]
    if not all(star for _, star, _ in sources):
        return found
    first, _, leaf = sources[0]
    for name in [name for name in tensors if name.endswith(f"{first}.0.{leaf}")]:
        owner = name.removesuffix(f"{first}.0.{leaf}")
        parts = list[TensorInfo]()
        while all(f"{owner}{start}.{len(parts) // len(sources)}.{end}" in found for start, _, end in sources):
            number = len(parts) // len(sources)
            parts += [found.pop(f"{owner}{start}.{number}.{end}") for start, _, end in sources]
        found[owner + conversion.target_patterns[0].lstrip(".")] = OneByOne.of(parts, len(sources))
    return found


def matrices_of_experts(kind: str) -> dict[str, tuple[str, ...]]:
    """Return the names of the matrices that checkpoints store for each expert, by the tensor that joins them."""
    return {
        conversion.target_patterns[0].rpartition(".")[2]: tuple(
            source.replace("\\", "").rpartition(".*.")[2].removesuffix(".weight")
            for source in conversion.source_patterns
        )
        for conversion in get_checkpoint_conversion_mapping(kind) or []
        if isinstance(conversion, WeightConverter)
        and any(isinstance(operation, MergeModulelist) for operation in conversion.operations)
    }
