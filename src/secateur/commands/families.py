"""`families`: which models can be pruned, what of them, and into which formats."""

from typing import NamedTuple

from secateur.families.entry import Family
from secateur.families.registry import FAMILIES

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
            _stock(family),
            ", ".join(family.gguf.architectures),
        )
        for name, family in sorted(FAMILIES.items())
    ]


def _heads(family: Family) -> str:
    if family.token_mixer is not None:
        return "yes, of blocks that have some"
    if family.heads_locked is None:
        return "yes"
    if family.locked_by is not None:
        return f"yes; with {family.locked_by} no: {family.heads_locked}"
    return f"{'no' if family.attention_fixed else 'all of a block or none'}: {family.heads_locked}"


def _stock(family: Family) -> str:
    if family.stock.derived:
        return "the dense model alone"
    return STOCK_HEADS["dense" if family.heads_locked and not family.locked_by else family.stock.heads]
