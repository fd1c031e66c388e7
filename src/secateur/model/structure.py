"""What a prunable block looks like, as frozen data: every other file speaks in these terms.

A Transformer block holds two depth-2 modules (level-1 layers in parallel, then one level-2 layer).
Pruning removes *units*: query heads (with the key/value heads that no kept query head uses) from the
attention, channels from the feed-forward. A `Slab` says which part of a stored tensor follows a unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Unit = Literal["head", "group", "channel"]
Kind = Literal["heads", "channels"]
Pattern = Literal["groups", "heads", "channels"]
"""How units may leave together: whole key/value groups, one query head of every group, or single channels."""

KINDS: tuple[Kind, ...] = ("heads", "channels")


@dataclass(frozen=True)
class Slab:
    """The part of one stored tensor whose `axis` runs over units, `size` consecutive entries each."""

    name: str
    """Tensor name inside the block, for example `self_attn.q_proj.weight`."""
    axis: int
    unit: Unit
    units: int
    size: int
    offset: int = 0
    """First entry along `axis`; not zero where several layers are fused into one tensor."""

    @property
    def span(self) -> tuple[int, int]:
        """First and one past the last entry along `axis`."""
        return self.offset, self.offset + self.units * self.size

    @property
    def bias(self) -> str:
        """The name that the bias of the same layer has, if there is one."""
        return self.name.removesuffix("weight") + "bias"


@dataclass(frozen=True)
class Depth2:
    """One prunable module of a block."""

    kind: Kind
    level1: tuple[Slab, ...]
    """Every level-1 weight and bias, those of the query, key and value or of the up and gate layers."""
    level2: Slab
    """The level-2 weight; its `axis` is the inner one, the other one is the residual width."""
    bias: str | None
    """Name of the stored level-2 bias, if the architecture has one."""
    path: str | None
    """The submodule whose output joins the residual stream; None where the layers hang in the block itself."""
    source: str
    """A level-1 layer; its input is the module's input."""
    sink: str
    """The level-2 layer."""
    post_norm: str | None
    """A norm between level 2 and the residual stream (Gemma 2 and 3, OLMo-2)."""
    groups: int
    """Key/value heads; 1 for channels."""
    scored: tuple[Slab, ...]
    """Level-1 weights whose rows feed level-2 columns one to one: (up, gate), (up,); empty for attention."""
    locked: str | None
    """Why no unit can be removed without changing what the others compute, where that is so."""

    @property
    def units(self) -> int:
        """Query heads, or channels."""
        return self.level2.units

    @property
    def size(self) -> int:
        """Level-2 input entries per unit: the head dimension, or 1."""
        return self.level2.size

    @property
    def per_group(self) -> int:
        """Query heads per key/value head; for channels, all of them."""
        return self.units // self.groups

    @property
    def bias_name(self) -> str:
        """What level 2's bias is called, or would be."""
        return self.bias or f"{self.sink}.bias"

    @property
    def free_bias(self) -> bool:
        """A level-2 bias can be fitted: behind a norm, what is constant in the residual stream is no bias of it."""
        return self.post_norm is None

    def steps(self, pattern: Pattern) -> int:
        """How many steps of width a pattern has: groups, heads per group, or channels."""
        return {"groups": self.groups, "heads": self.per_group, "channels": self.units}[pattern]

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The ways in which units of this module may leave so that the tensors keep a loadable layout."""
        if self.kind == "channels":
            return ("channels",)
        if self.per_group == 1:
            return ("groups",)
        return ("groups", "heads") if self.groups > 1 else ("heads",)


@dataclass(frozen=True)
class Width:
    """How much of a block is kept: key/value groups, query heads in each of them, feed-forward channels."""

    groups: int
    per_group: int
    channels: int

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.groups * self.per_group

    def along(self, pattern: Pattern) -> int:
        """How many units are kept as a pattern counts them: groups, heads in each, or channels."""
        return {"groups": self.groups, "heads": self.per_group, "channels": self.channels}[pattern]


@dataclass(frozen=True)
class Keep:
    """The kept units of a block, as sorted indices into the dense block's query heads and channels."""

    heads: tuple[int, ...]
    channels: tuple[int, ...]

    def units(self, kind: Kind) -> tuple[int, ...]:
        """The indices for one module."""
        return self.heads if kind == "heads" else self.channels


@dataclass(frozen=True)
class Block:
    """The two modules of a block and its size."""

    attention: Depth2
    feed_forward: Depth2
    parameters: int
    """All parameters of the dense block, norms included."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of every tensor of the dense block, by its name inside the block."""

    def module(self, kind: Kind) -> Depth2:
        """The module that holds units of that kind."""
        return self.attention if kind == "heads" else self.feed_forward

    @property
    def width(self) -> Width:
        """The dense width."""
        return Width(self.attention.groups, self.attention.per_group, self.feed_forward.units)

    def emptied(self, module: Depth2, names: Iterable[str]) -> list[str]:
        """Which tensors go with the module's last unit: all inside it but the level-2 bias, which is still added."""
        slabs = {slab.name for slab in (*module.level1, module.level2)}
        inside = f"{module.path}." if module.path else None
        return [
            n for n in names if n != module.bias_name and (n in slabs or (inside is not None and n.startswith(inside)))
        ]

    def kept_parameters(self, width: Width) -> int:
        """Parameters of the block at a width; exact, from the stored shapes."""
        counts: dict[Unit, int] = {"head": width.heads, "group": width.groups, "channel": width.channels}
        total = self.parameters
        for module in (self.attention, self.feed_forward):
            if not counts[module.level2.unit]:
                total -= sum(math.prod(self.shapes[name]) for name in self.emptied(module, self.shapes))
                continue
            for slab in (*module.level1, module.level2):
                shape = self.shapes[slab.name]
                across = math.prod(shape) // shape[slab.axis]
                total -= (slab.units - counts[slab.unit]) * slab.size * across
        return total
