"""How alike the attention heads of each block are: one pass over the dense model, block by block.

The probabilities are those that the model's own attention computes, whatever it does to scores (masks, windows,
softcaps, scales): transformers lets an attention function be named in the config, and the one put there hands every
call on to the family's eager function, a few query rows at a time. No tensor of all rows by all keys arises.

Shapes: b rows, h query heads, t positions, n attention rows, k keys, d head size.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from secateur.base.errors import SecateurError
from secateur.base.progress import Silent, Watcher
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream

CHUNK = 2**19
"""Probabilities looked at together: all pairs of heads are compared while these lie in the processor's cache."""
NAME = "secateur_watched"
"""What configs call the attention function below."""

Distance = Callable[[Tensor], Tensor]
"""From the probability rows of a module's heads (h x n x k: heads, rows, keys) to the distances of all pairs, summed
over the rows (h x h, float64, symmetric, zero on the diagonal)."""


def jensen_shannon(probabilities_hnk: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats, a `Distance`.

    JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2, H the entropy; from Lin, 1991, *Divergence measures based on the
    Shannon entropy*.
    """
    heads = len(probabilities_hnk)
    own = _entropy(probabilities_hnk)
    sums = torch.zeros(heads, heads, dtype=torch.float64, device=probabilities_hnk.device)
    for i in range(heads - 1):
        middle = (probabilities_hnk[i + 1 :] + probabilities_hnk[i]).mul_(0.5)
        # Rounding can leave heads that agree just below zero.
        sums[i, i + 1 :] = (_entropy(middle) - (own[i + 1 :] + own[i]) / 2).clamp_min(0).sum(1)
    return sums + sums.T


def _entropy(rows_hnk: Tensor) -> Tensor:
    """Entropy of every row (h x n), float64; what has no probability adds nothing."""
    tiny = torch.finfo(rows_hnk.dtype).tiny
    return rows_hnk.clamp_min(tiny).log_().mul_(rows_hnk).sum(-1).double().neg_()


def head_distances(
    stream: BlockStream,
    rows: Tensor | Rows,
    *,
    blocks: range | None = None,
    distance: Distance = jensen_shannon,
    watcher: Watcher | None = None,
) -> dict[int, Tensor]:
    """The mean distance between the attention of every two query heads of a block, in the dense model.

    Args:
        rows: calibration tokens (rows x length), or several groups of them, each counted by its weight.
        distance: between probability rows; by default the Jensen-Shannon divergence, in nats.

    Returns:
        For each block with an attention of its own the means over samples and positions (h x h, float64, on the host).

    Raises:
        SecateurError: the attention of this model cannot be watched, or gives NaN or infinite values.
    """
    blocks = blocks if blocks is not None else range(len(stream))
    watcher, rows = watcher or Silent(), Rows.of(rows)
    counted = sum(weight * group.numel() for group, weight in zip(rows.groups, rows.weights, strict=True))
    rows = stream.own(rows)
    found: dict[int, Tensor] = {}
    free = any(not block.attention.locked for block in stream.blocks)
    with stream.arena() as arena, _implementation(stream.model.config) as use:
        # Masks as the eager function wants them: others may be left out where a kernel knows them.
        use("eager")
        hidden = stream.embed(rows, arena)
        for index in watcher.track(range(blocks.stop), "Compare"):
            attention = stream.blocks[index].attention
            if attention.fixed and not free:
                raise SecateurError(f"heads are not compared, as {attention.locked}")
            watched = index in blocks and not attention.fixed
            with stream.filled(index) as layer:
                heads = attention.units
                sums = torch.zeros(heads, heads, dtype=torch.float64, device=stream.device)
                for at in rows.batches():
                    if not watched or not at.weight:
                        use("eager")
                        hidden[at] = stream.run_through(index, layer, hidden[at], at.group)
                        continue
                    with _watched(layer, attention.path, distance) as parts:
                        use(NAME)
                        hidden[at] = stream.run_through(index, layer, hidden[at], at.group)
                    sums += at.weight * torch.stack(parts).sum(0)
            if watched:
                stream.processes.all_reduce(sums)
                found[index] = (sums / counted).cpu()
    return found


@contextmanager
def _implementation(config: Any) -> Iterator[Callable[[str], None]]:
    """A function that names the attention function in a config; the old name comes back."""
    before = config._attn_implementation

    def use(name: str) -> None:
        config._attn_implementation = name

    try:
        yield use
    finally:
        use(before)


@contextmanager
def _watched(layer: nn.Module, path: str | None, distance: Distance) -> Iterator[list[Tensor]]:
    """The distances in a block's attention, in parts (each h x h): one for each chunk of query rows that it computes.

    In a chunk, the keys behind its last row are left out: they are masked for all its rows.
    """
    parts: list[Tensor] = []
    module = layer.get_submodule(path or "")
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise SecateurError(f"the attention of {type(module).__name__} cannot be watched; take another criterion")

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **how: Any
    ) -> tuple[Tensor, None]:
        batch, heads, length, _ = query.shape
        step = max(1, CHUNK // (batch * heads * length))
        outputs = []
        for start in range(0, length, step):
            stop = min(start + step, length)
            part = None if mask is None else mask[..., start:stop, :stop]
            output, probabilities = eager(
                module, query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], part, **how
            )
            outputs.append(output)
            parts.append(distance(probabilities.transpose(0, 1).flatten(1, 2)))
        return torch.cat(outputs, 1), None

    ALL_ATTENTION_FUNCTIONS[NAME] = attend
    try:
        yield parts
    finally:
        del ALL_ATTENTION_FUNCTIONS[NAME]
