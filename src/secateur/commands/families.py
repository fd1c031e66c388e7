"""`families`: which models can be pruned, what of them, and into which formats."""

from typing import NamedTuple

from secateur.formats.gguf_architectures import SOURCES
from secateur.formats.stock import STOCK
from secateur.model.families import FAMILIES, Family

STOCK_HEADS = {"any": "any heads", "divisors": "heads that divide the hidden size", "dense": "all heads"}


class FamilyRow(NamedTuple):
    """What is known of one family."""

    name: str
    """Its `model_type`."""
    heads: str
    """Whether single attention heads go; why not, where they do not."""
    fed: str
    """What goes of the feed-forward."""
    stock: str
    """What the family's own class takes."""
    gguf: str
    """llama.cpp's architectures, the best known first; empty where there is none."""


def families() -> list[FamilyRow]:
    """All families, by name. The format `hf` holds whatever goes."""
    return [
        FamilyRow(
            name,
            _heads(family),
            "channels" if family.experts is None else "experts, channels",
            _stock(name, family),
            ", ".join(SOURCES[name].architectures) if name in SOURCES else "",
        )
        for name, family in sorted(FAMILIES.items())
    ]


def _heads(family: Family) -> str:
    if family.mixer is not None:
        return "yes, of blocks that have some"
    if family.heads_locked is None:
        return "yes"
    if family.locking is not None:
        return f"yes; with {family.locking} no: {family.heads_locked}"
    return f"{'no' if family.heads_fixed else 'all of a block or none'}: {family.heads_locked}"


def _stock(name: str, family: Family) -> str:
    if STOCK[name].derived:
        return "the dense model alone"
    return STOCK_HEADS["dense" if family.heads_locked and not family.locking else STOCK[name].heads]
