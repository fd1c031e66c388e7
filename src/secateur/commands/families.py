"""`families`: the model families with an entry, and the modules of one model."""

from collections.abc import Sequence
from typing import NamedTuple

from secateur.checkpoints.checkpoint import open_checkpoint
from secateur.families.registry import FAMILIES
from secateur.model.axes import config_keys
from secateur.model.stream import BlockStream


class FamilyRow(NamedTuple):
    """Row of the table of families."""

    name: str
    """The `model_type` in config.json."""
    gguf: str
    """Architectures of llama.cpp that can run the family, the preferred one first; empty if there is none."""
    vllm: str
    """Limit of vLLM for the family; empty if none is known."""


def list_families() -> list[FamilyRow]:
    """Return one row for each family with an entry, by name."""
    return [
        FamilyRow(
            name, ", ".join(entry.gguf.architectures), entry.vllm.backend or entry.vllm.instead_of_fewer_heads or ""
        )
        for name, entry in sorted(FAMILIES.items())
    ]


class ModuleRow(NamedTuple):
    """Row of the table of a model's modules."""

    blocks: str
    """Blocks that have the module, as ranges."""
    module: str
    """Place of the module inside these blocks."""
    units: str
    """Numbers of units along each axis."""
    layers: str
    """Layers with rows or columns for the units, the output projection last."""
    keys: str
    """Config keys of the numbers of units in the format `stock`; empty if only the format `hf` can change them."""
    locked: str
    """Why single units, or in a row without units all of the module, cannot be removed; empty if they can."""


def describe_model(model: str, *, trust_remote_code: bool = False) -> list[ModuleRow]:
    """Return one row for each module of a model's blocks; blocks with the same module share a row.

    Args:
        model: The model, as in `prune`.
        trust_remote_code: Whether the model's own code may run.

    Raises:
        SecateurError: The model cannot be opened or pruned.
    """
    stream = BlockStream(open_checkpoint(model, trust_remote_code=trust_remote_code))
    keys = config_keys(stream.family)
    found: dict[tuple[str, ...], list[int]] = {}
    for index, block in enumerate(stream.blocks):
        for module in block.modules_left:
            prefix = f"{module.path}." if module.path else ""
            layers = dict.fromkeys((slab.layer or slab.name).removeprefix(prefix) for slab in module.slabs)
            along = {names for names in keys if set(names) <= {axis.name for axis in module.axes}}
            row = (
                module.path or "the block itself",
                ", ".join(f"{axis.units:,} {axis.label}" for axis in module.axes),
                ", ".join(layers),
                ", ".join(keys[names][0] for names in sorted(along)),
                module.locked or "",
            )
            found.setdefault(row, []).append(index)
        for other in stream.others(index):
            found.setdefault((other.path, "", "", "", other.why), []).append(index)
    return [ModuleRow(_ranges(blocks), *row) for row, blocks in found.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as ranges, such as 0-3, 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
