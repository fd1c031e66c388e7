"""What a block reads beside the residual stream, where blocks are run one at a time.

Gemma 4's small models have two such things. Each block adds a function of the token of its own: the model makes these
inputs of all blocks at once, so they are kept by row, once for all streams. And the last blocks attend with keys and
values of an earlier one: they depend on the stream, so they travel with it, as columns behind the residual width. One
more column says which row it is.

Shapes: b rows of a batch, t positions, d residual width, c columns in all, e entries of a token's keys and of its
values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.families.entry import Family
from secateur.model.arena import Activations, Arena
from secateur.model.rows import Batch, Rows


class Shared(NamedTuple):
    """Keys and values of one block that later ones attend with."""

    keys: slice
    """Columns of the keys."""
    values: slice
    """And of the values."""
    size: int
    """Entries of one head."""


class Beside:
    """Side inputs of a model's blocks; of most models there are none, and nothing here costs anything."""

    def __init__(self, config: Any, family: Family, layers: Sequence[nn.Module], width: int):
        self.width = width
        """d."""
        self._own = bool(family.per_layer_input and getattr(config, family.per_layer_input, None))
        self._kinds: list[str | None] = [None] * len(layers)
        """What each block shares: one kind's keys and values."""
        self._stores: set[int] = set()
        self._shared: dict[str, Shared] = {}
        end = width + 1
        for index, layer in enumerate(layers if family.kv_sharing else ()):
            if (sharing := family.sharing(config, layer.get_submodule(family.attention))) is None:
                continue
            self._kinds[index] = sharing.layer_type
            if sharing.lends:
                middle, last = end + sharing.entries, end + 2 * sharing.entries
                self._shared[sharing.layer_type] = Shared(slice(end, middle), slice(middle, last), sharing.head_dim)
                end = last
                self._stores.add(index)
        self.columns = end if self._own or self._shared else width
        """c: of what flows from block to block."""
        self._inputs: list[Activations] = []
        self.kept = self._own * len(layers) * int(getattr(config, family.per_layer_input or "", None) or 0)
        """Entries of a token's inputs, of all blocks."""

    @property
    def own_inputs(self) -> bool:
        """Each block has an input of its own for every token."""
        return self._own

    @property
    def lent(self) -> bool:
        """Some blocks attend with keys and values of others."""
        return bool(self._stores)

    def stores(self, index: int) -> bool:
        """Later blocks attend with this one's keys and values."""
        return index in self._stores

    def prepare(self, rows: Rows, arena: Arena) -> None:
        """Make room for what blocks are given for these rows; `note` fills it."""
        self._inputs, self._rows, self._arena = [], rows, arena

    def note(self, at: Batch, hidden_btd: Tensor, given: Sequence[tuple[Any, ...]]) -> Tensor:
        """Keep what a batch's blocks are given behind the residual stream, and return that stream with its columns."""
        if self.columns == self.width:
            return hidden_btd
        if self._own:
            if not self._inputs:
                sizes = [args[0].shape[-1] for args in given]
                self._inputs = [self._arena.empty(self._rows, size) for size in sizes]
            for kept, args in zip(self._inputs, given, strict=True):
                kept[at] = args[0]
        rest = hidden_btd.new_zeros(*hidden_btd.shape[:-1], self.columns - self.width)
        rest[..., 0] = torch.arange(at.rows.start, at.rows.stop, device=rest.device)[:, None]
        return torch.cat([hidden_btd, rest], -1)

    def given(
        self, index: int, group: int, hidden_btc: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A block's arguments for a batch, from those that the model prepared for one row."""
        if self._own:
            rows = hidden_btc[:, 0, self.width].long()
            start, stop = int(rows.min()), int(rows.max()) + 1
            own = self._inputs[index].parts[group][start:stop].to(hidden_btc.device)
            args = (own[rows - start], *args[1:])
        if self._shared:
            shared = {
                kind: (self._heads(hidden_btc[..., at.keys], at.size), self._heads(hidden_btc[..., at.values], at.size))
                for kind, at in self._shared.items()
                if kind == self._kinds[index] and index not in self._stores
            }
            kwargs = kwargs | {"shared_kv_states": shared}
        return args, kwargs

    def behind(self, index: int, hidden_btc: Tensor, after_btd: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The stream behind a block, with its columns."""
        if self.columns == self.width:
            return after_btd
        rest = hidden_btc[..., self.width :]
        if self.stores(index):
            kind = str(self._kinds[index])
            at, found = self._shared[kind], kwargs["shared_kv_states"][kind]
            pieces = [value.transpose(1, 2).flatten(2) for value in found]
            before, later = rest[..., : at.keys.start - self.width], rest[..., at.values.stop - self.width :]
            rest = torch.cat([before, *pieces, later], -1)
        return torch.cat([after_btd, rest], -1)

    @staticmethod
    def _heads(values_bte: Tensor, size: int) -> Tensor:
        """By heads, as attention takes them (b x heads x t x size)."""
        return values_bte.unflatten(-1, (-1, size)).transpose(1, 2)
