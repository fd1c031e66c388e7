"""Side inputs of blocks: inputs other than the residual stream, for blocks that are run one at a time.

Gemma 4's small models have two kinds of side inputs. (1) Each block has a second input that depends on the token alone.
The model computes these inputs for all blocks at once, and they are stored by row, once for all streams. (2) The last
blocks attend to keys and values of an earlier block. These depend on the stream, so they are appended to the stream as
columns after the residual width. One more column holds the index of the row.

Shapes: b rows of a batch, t positions, d residual width, c all columns, e entries of a token's keys or of its values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.families.family import Family, submodule
from secateur.model.arena import Activations, Arena
from secateur.model.rows import Batch, Rows


class Shared(NamedTuple):
    """Columns of the keys and values of one block to which later blocks attend."""

    keys: slice
    """Columns of the keys."""
    values: slice
    """Columns of the values."""
    size: int
    """Entries per head."""


class SideInputs:
    """Side inputs of a model's blocks. Most models have none; all methods then return at once."""

    def __init__(self, config: Any, family: Family, layers: Sequence[nn.Module], width: int):
        self.width = width
        """Residual width d."""
        self.has_token_inputs = bool(getattr(config, family.per_layer_input or "", None))
        """Whether each block has a second input that depends on the token alone."""
        self._kinds: list[str | None] = [None] * len(layers)
        """Layer type whose keys and values a block shares, for each block; None if a block does not share."""
        self.stores: set[int] = set()
        """Indices of the blocks to whose keys and values later blocks attend."""
        self._shared: dict[str, Shared] = {}
        end = width + 1
        for index, layer in enumerate(layers if family.kv_sharing else ()):
            attention = submodule(layer, family.attention)
            if attention is None or (sharing := family.sharing(config, attention)) is None:
                continue
            self._kinds[index] = sharing.layer_type
            if sharing.provides_keys:
                middle, last = end + sharing.entries, end + 2 * sharing.entries
                self._shared[sharing.layer_type] = Shared(slice(end, middle), slice(middle, last), sharing.head_dim)
                end = last
                self.stores.add(index)
        self.columns = end if self.has_token_inputs or self._shared else width
        """Number of columns c of the stream between blocks."""
        self._inputs: list[Activations] = []

    def prepare(self, rows: Rows, arena: Arena) -> None:
        """Prepare to store the second inputs for rows; `record` fills the store."""
        self._inputs, self._rows, self._arena = [], rows, arena

    def record(self, at: Batch, hidden_btd: Tensor, arguments: Sequence[tuple[Any, ...]]) -> Tensor:
        """Store the second inputs of a batch, and return the stream with its additional columns.

        Args:
            at: The batch.
            hidden_btd: Residual stream before the first block.
            arguments: Arguments that the model gives to each block after the residual stream.
        """
        if self.columns == self.width:
            return hidden_btd
        if self.has_token_inputs:
            if not self._inputs:
                sizes = [args[0].shape[-1] for args in arguments]
                self._inputs = [self._arena.empty(self._rows, size) for size in sizes]
            for stored, args in zip(self._inputs, arguments, strict=True):
                stored[at] = args[0]
        rest = hidden_btd.new_zeros(*hidden_btd.shape[:-1], self.columns - self.width)
        rest[..., 0] = torch.arange(at.rows.start, at.rows.stop, device=rest.device)[:, None]
        return torch.cat([hidden_btd, rest], -1)

    def arguments(
        self, index: int, group: int, hidden_btc: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a block's arguments for a batch, from the arguments that the model prepared for one row."""
        if self.has_token_inputs:
            rows = hidden_btc[:, 0, self.width].long()
            start, stop = int(rows.min()), int(rows.max()) + 1
            own = self._inputs[index].parts[group][start:stop].to(hidden_btc.device)
            args = (own[rows - start], *args[1:])
        if self._shared:
            shared = {
                kind: (self._heads(hidden_btc[..., at.keys], at.size), self._heads(hidden_btc[..., at.values], at.size))
                for kind, at in self._shared.items()
                if kind == self._kinds[index] and index not in self.stores
            }
            kwargs = kwargs | {"shared_kv_states": shared}
        return args, kwargs

    def stream_after(self, index: int, hidden_btc: Tensor, after_btd: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Return the stream after a block, with its additional columns."""
        if self.columns == self.width:
            return after_btd
        rest = hidden_btc[..., self.width :]
        if index in self.stores:
            kind = str(self._kinds[index])
            at, found = self._shared[kind], kwargs["shared_kv_states"][kind]
            pieces = [value.transpose(1, 2).flatten(2) for value in found]
            before, later = rest[..., : at.keys.start - self.width], rest[..., at.values.stop - self.width :]
            rest = torch.cat([before, *pieces, later], -1)
        return torch.cat([after_btd, rest], -1)

    @staticmethod
    def _heads(values_bte: Tensor, size: int) -> Tensor:
        """Return columns split into heads (b x heads x t x size)."""
        return values_bte.unflatten(-1, (-1, size)).transpose(1, 2)
