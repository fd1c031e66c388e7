"""Sizes of a block in llama.cpp's terms: its numbers of heads, experts and channels."""

from __future__ import annotations

from dataclasses import dataclass, replace

from secateur.model.axes import Width
from secateur.model.units.channels import CHANNELS
from secateur.model.units.experts import EXPERT_CHANNELS, EXPERTS
from secateur.model.units.heads import HEADS, KV_GROUPS

STATED_AXES = frozenset({*HEADS, CHANNELS, EXPERTS, EXPERT_CHANNELS})
"""Axes whose numbers of units a GGUF file states."""


@dataclass(frozen=True)
class BlockSizes:
    """Sizes of one block."""

    heads: int
    """Number of query heads."""
    kv_heads: int
    """Number of key/value heads."""
    channels: int | None
    """Channels of the feed-forward; None if the block has experts instead."""
    experts: int
    """Number of experts; zero in a block without any."""
    expert_channels: int
    """Channels of each expert."""
    head_dim: int
    """Entries of a query head and of a key head."""
    value_dim: int
    """Entries of a head in the input of the output layer."""

    @classmethod
    def of(cls, width: Width, head_dim: int, value_dim: int) -> BlockSizes:
        """Return the sizes of a block, from its width and its head sizes."""
        return cls(
            width.product(HEADS) if KV_GROUPS in width else 0,
            width.get(KV_GROUPS, 0),
            width.get(CHANNELS),
            width.get(EXPERTS, 0),
            width.get(EXPERT_CHANNELS, 0),
            head_dim,
            value_dim,
        )

    def numbers(self) -> dict[str, int]:
        """Return the numbers that must be equal in all blocks if an architecture has one width for all blocks."""
        heads, channels = {"heads": self.heads, "kv_heads": self.kv_heads}, self.channels
        experts = {"experts": self.experts, "expert_channels": self.expert_channels} if self.experts else {}
        return heads | experts | ({} if channels is None else {"channels": channels})

    def filled(self, multiple: int) -> BlockSizes:
        """Return the sizes with as many channels as the file has, a multiple of a number."""
        if self.channels is None or self.experts:
            return self
        return replace(self, channels=filled(self.channels, multiple))


def filled(channels: int, multiple: int) -> int:
    """Return the number of channels in a file: a multiple of a number, and not zero.

    In a block without channels, llama.cpp would not add the attention's output to the residual stream.
    """
    return max(1, -(-channels // multiple)) * multiple
