"""Registry of the functions that describe the modules of a block; the files of this folder register them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from secateur.model.axes import load_units

if TYPE_CHECKING:
    from secateur.families.entry import Family
    from secateur.model.structure import PrunableModule

Describer = Callable[[Any, "Family", Any], "PrunableModule | None"]
"""Function of a config, a family and a block on any device that describes a module; None if the module is of another
kind."""

_DESCRIBERS: dict[str, list[tuple[int, Describer]]] = {}


def describes(role: str, *, rank: int) -> Callable[[Describer], Describer]:
    """Register a function that describes an attention or a feed-forward. Functions of lower rank are tried first."""

    def register(describer: Describer) -> Describer:
        _DESCRIBERS.setdefault(role, []).append((rank, describer))
        return describer

    return register


def described(role: str, config: Any, family: Family, layer: Any) -> PrunableModule:
    """Return the module of a block in a role, described by the first function that does not return None."""
    load_units()
    ordered = (describer for _, describer in sorted(_DESCRIBERS[role], key=lambda one: one[0]))
    return next(module for describer in ordered if (module := describer(config, family, layer)) is not None)
