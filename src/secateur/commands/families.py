"""`families`: the model families that can be pruned, and the formats that hold the result."""

from typing import NamedTuple

from secateur.families.entry import Family
from secateur.families.registry import FAMILIES

STOCK_HEADS = {"any": "any number", "divisors": "divisors of the hidden size", "dense": "as in the dense model"}
"""Numbers of heads that a stock class takes, in words."""


class FamilyRow(NamedTuple):
    """Row of the table of families."""

    name: str
    """The `model_type` in config.json."""
    heads: str
    """Whether single heads can be removed, and why not if they cannot."""
    feed_forward: str
    """Kinds of units of the feed-forward that can be removed."""
    stock: str
    """Numbers of heads that the stock class takes."""
    gguf: str
    """Architectures of llama.cpp that can run the family, the preferred one first; empty if there is none."""


def list_families() -> list[FamilyRow]:
    """Return one row for each family, by name. The format `hf` holds whatever can be removed."""
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
    """Return whether single heads can be removed, in words."""
    if family.token_mixer is not None:
        return "yes, in blocks with attention"
    if family.heads_locked is None:
        return "yes"
    if family.locked_if is not None:
        return f"yes; not with {family.locked_if}: {family.heads_locked}"
    return f"{'no' if family.attention_fixed else 'all of a block or none'}: {family.heads_locked}"


def _stock(family: Family) -> str:
    """Return the numbers of heads that the stock class takes, in words."""
    if family.stock.derives_channels:
        return "not supported"
    return STOCK_HEADS["dense" if family.heads_locked and not family.locked_if else family.stock.head_counts]
