"""Reading of an attention: which rows of its layers belong to which query heads and KV groups.

Row r of a layer belongs to a head if the head's inputs of the output projection depend on output r. Queries are read
for a token itself alone, keys and values for earlier tokens too; a value feeds one entry of a head, a key feeds all.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.layout.probe import BlockProbe, Feeds, same

ACROSS = "its query and key norms run across all heads"
MIXED = "its heads are not independent: a query feeds several of them"
ORDER = "its rows of queries, keys and values are not stored head by head"


class Attention(NamedTuple):
    """What was read: fields of the model's layout, numbers of heads, and why single heads cannot be removed."""

    fields: dict[str, Any]
    heads: int
    groups: int
    dim: int
    locked: str | None


class _Rows(NamedTuple):
    """Rows of one layer: the heads to which each belongs (heads x rows), and whether it is a query, key or value."""

    heads: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    fed: int
    """Largest number of inputs of the output projection that a row feeds."""

    @property
    def kinds(self) -> str:
        """Letters of the kinds that the layer has rows of."""
        pairs = zip("qkv", (self.queries, self.keys, self.values), strict=True)
        return "".join(letter for letter, rows in pairs if bool(rows.any()))

    @property
    def is_shared(self) -> bool:
        """Whether each row belongs to all heads."""
        used = self.heads.any(0)
        return len(self.heads) > 1 and bool(self.heads[:, used].all())


def _rows(feeds: Feeds, heads: int) -> _Rows:
    last, earlier = (part.unflatten(0, (heads, -1)) for part in (feeds.last, feeds.earlier))
    # A value feeds one entry of each of its heads.
    is_key = (earlier.sum(1) > 1).any(0)
    is_value = earlier.flatten(0, 1).any(0) & ~is_key
    fed = int(feeds.any.sum(0).max())
    return _Rows((last | earlier).any(1), last.flatten(0, 1).any(0) & ~is_key & ~is_value, is_key, is_value, fed)


def output_of(probe: BlockProbe, path: str) -> str | None:
    """Return the output projection of a module: the last of its layers, if its output is the module's, or if the module
    adds the residual stream to it; else None."""
    inside = [layer for layer in probe.layers if layer.startswith(f"{path}.")]
    found, whole = inside[-1] if inside else None, probe.output(path)
    if found is None or not isinstance(whole, Tensor):
        return None
    own, (args, kwargs, _) = probe.output(found), probe.calls[path]
    others = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.shape == whole.shape]
    adds = own.numel() == whole.numel() and any(same(own.reshape(whole.shape) + one, whole) for one in others)
    return found if adds or same(own, whole) else None


def read_attention(probe: BlockProbe, path: str) -> Attention | None:
    """Read an attention at a path; None if the module computes no softmax over keys, or has no output projection."""
    heads, output = probe.softmax_heads(path), output_of(probe, path)
    if heads is None or output is None:
        return None
    feeds = {layer: one for layer, one in probe.feeds(output).items() if layer.startswith(f"{path}.")}
    entries = probe.input(output).shape[-1]
    fields: dict[str, Any] = {"attention": path, "output": output.removeprefix(f"{path}.")}
    if entries % heads:
        return Attention(fields, heads, heads, 0, MIXED)
    dim = entries // heads
    rows = {layer.removeprefix(f"{path}."): _rows(one, heads) for layer, one in feeds.items()}
    groups = _groups(rows, heads)
    layers, locked = _layers(probe, path, rows, heads, groups or heads, dim)
    attention = probe.block.get_submodule(path)
    sinks = [name for name, value in attention.named_parameters(recurse=False) if tuple(value.shape) == (heads,)]
    fields |= layers | ({"sinks": sinks[0]} if len(sinks) == 1 else {})
    if heads == 1 or (groups is not None and not _mix(rows)):
        return Attention(fields, heads, groups or heads, dim, locked)
    sizes = (heads * dim, (groups or 1) * dim)
    across = any(
        "norm" in name and value.dim() == 1 and value.numel() in sizes for name, value in attention.named_parameters()
    )
    return Attention(fields, heads, groups or heads, dim, ACROSS if across else MIXED)


def _mix(rows: dict[str, _Rows]) -> bool:
    """Return whether a query feeds several heads, or all queries feed all heads."""
    own = [one for one in rows.values() if not one.is_shared]
    several = any(bool((one.heads[:, one.queries].sum(0) > 1).any()) for one in own)
    return several or not any("q" in one.kinds for one in own)


def _groups(rows: dict[str, _Rows], heads: int) -> int | None:
    """Return the number of KV groups: sets of heads with the same keys and values; None if sets overlap."""
    own = [one for one in rows.values() if one.kinds.strip("q") and not one.is_shared]
    if not own:
        return 1
    together = torch.cat([one.heads[:, one.keys | one.values] for one in own], 1)
    together = together[:, together.any(0)]
    sets = together.T.unique(dim=0)
    groups = len(sets)
    if heads % groups:
        return None
    expected = torch.eye(groups, dtype=torch.bool).repeat_interleave(heads // groups, 1)
    return groups if all(any(torch.equal(one, want) for want in expected) for one in sets) else None


def _layers(
    probe: BlockProbe, path: str, rows: dict[str, _Rows], heads: int, groups: int, dim: int
) -> tuple[dict[str, Any], str | None]:
    """Return the names of the layers of queries, keys and values, and why their rows cannot be cut head by head."""
    own = {name: one for name, one in rows.items() if not one.is_shared or heads == 1 or groups == 1}
    # Gates on the outputs of heads have rows for each head too; each feeds fewer inputs than a query.
    asking = sorted((name for name, one in own.items() if one.kinds == "q"), key=lambda name: -int(own[name].fed))
    gates, own = asking[1:], {name: one for name, one in own.items() if name not in asking[1:]}
    by_kind = {one.kinds: name for name, one in own.items()}
    if len(by_kind) < len(own) or (
        gates and "q" in by_kind and not all(_in_order(rows[name], heads) for name in gates)
    ):
        return {}, ORDER
    more = {"head_gates": tuple(gates)} if gates else {}
    latent = next((name for kinds, name in by_kind.items() if kinds in ("k", "kv") and groups == heads > 1), None)
    shared = [name for name, one in rows.items() if one.is_shared and one.kinds.strip("q")]
    if by_kind.keys() >= {"q", "kv"} and latent and not gates:
        reads = [layer for layer in probe.feeds(f"{path}.{latent}") if layer.startswith(f"{path}.")]
        if len(reads) != 1:
            return {}, ORDER
        fields = {
            "latent": (reads[0].removeprefix(f"{path}."), latent),
            "latent_queries": by_kind["q"],
            "queries": by_kind["q"],
        }
        even = all(_in_order(own[by_kind[kinds]], heads) for kinds in ("q", "kv"))
        return fields, None if even else ORDER
    if shared and groups == heads > 1:
        return {}, ORDER
    if by_kind.keys() == {"q", "k", "v"}:
        fields = {"queries": by_kind["q"], "keys": by_kind["k"], "values": by_kind["v"], **more}
        even = _in_order(own[by_kind["q"]], heads) and all(_in_order(own[by_kind[kind]], groups) for kind in "kv")
        return fields, None if even else ORDER
    if by_kind.keys() != {"qkv"}:
        return {}, ORDER
    for interleaved in (False, True) if groups > 1 else (False,):
        if _inside(own[by_kind["qkv"]].heads, _fused(heads, groups, dim, interleaved)):
            return {"fused": by_kind["qkv"], "interleaved": interleaved}, None
    return {"fused": by_kind["qkv"]}, ORDER


def _in_order(rows: _Rows, units: int) -> bool:
    """Return whether a layer has the same number of rows for each unit, one unit after the other."""
    heads, count = rows.heads.shape
    if count % units:
        return False
    wanted = (
        torch.eye(units, dtype=torch.bool).repeat_interleave(heads // units, 0).repeat_interleave(count // units, 1)
    )
    return _inside(rows.heads, wanted)


def _inside(heads: Tensor, wanted: Tensor) -> bool:
    """Return whether rows belong to no other heads than they should; some rows may be clipped and feed nothing."""
    return heads.shape == wanted.shape and not bool((heads & ~wanted).any())


def _fused(heads: int, groups: int, dim: int, interleaved: bool) -> Tensor:
    """Return the heads (heads x rows) to which the rows of a fused layer belong."""
    queries = torch.eye(heads, dtype=torch.bool).repeat_interleave(dim, 1)
    keys = torch.eye(groups, dtype=torch.bool).repeat_interleave(heads // groups, 0).repeat_interleave(dim, 1)
    if not interleaved:
        return torch.cat([queries, keys, keys], 1)
    per_group = zip(queries.chunk(groups, 1), keys.chunk(groups, 1), strict=True)
    return torch.cat([part for query, key in per_group for part in (query, key, key)], 1)
