"""Slabs of a block's layers, with the orientation and biases of the layers."""

from typing import Any

from secateur.model.structure import Slab


def inputs_first(linear: Any) -> bool:
    """Return whether a layer stores its weight with inputs first (GPT-2's Conv1D) and not with outputs first
    (Linear)."""
    return hasattr(linear, "nf")


def input_projection(
    layer: Any, path: str, along: tuple[str, ...], units: int, size: int, offset: int = 0, run: int = 1, gap: int = 0
) -> tuple[Slab, ...]:
    """Return the slabs of a layer with units along its outputs: the weight, and the bias if there is one.

    Args:
        layer: The block.
        path: Path of the layer inside the block.
        along: Names of the axes along which the units lie, the outermost first.
        units: Number of units.
        size: Number of outputs of each unit.
        offset, run, gap: See `Slab`.
    """
    linear = layer.get_submodule(path)
    slabs = [Slab(f"{path}.weight", int(inputs_first(linear)), along, units, size, offset, run, gap)]
    if getattr(linear, "bias", None) is not None:
        slabs.append(Slab(f"{path}.bias", 0, along, units, size, offset, run, gap))
    return tuple(slabs)


def output_projection(
    layer: Any, path: str, along: tuple[str, ...], units: int, size: int | None = None
) -> tuple[Slab, str | None]:
    """Return the slab of the weight of a layer with units along its inputs, and the name of its bias; None without a
    bias.

    Without a size, units share all inputs in equal parts.
    """
    linear = layer.get_submodule(path)
    axis = int(not inputs_first(linear))
    slab = Slab(f"{path}.weight", axis, along, units, size or linear.weight.shape[axis] // units)
    return slab, slab.bias if getattr(linear, "bias", None) is not None else None
