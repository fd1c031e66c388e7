"""Distances between the attention heads of each block, from one pass over the dense model.

The model computes the attention probabilities itself, including masks, windows, softcaps and scales. In
transformers, the config names the attention function. This file registers a function that calls the family's eager
attention for a few query positions at a time, so that no tensor with all positions and all keys is needed.

Shapes: b rows, h query heads, t positions, n attention rows, k keys, d head size.
"""

import sys
from collections.abc import Iterator
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
"""Number of probabilities that are compared at once; they fit the processor's cache."""
ATTENTION_NAME = "secateur_watched"
"""Name of the attention function in configs."""


def jensen_shannon(probabilities_hnk: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergences between all pairs of heads in nats, summed over rows (h x h).

    JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2, where H is the entropy (Lin, 1991, *Divergence measures based on the
    Shannon entropy*).
    """
    heads = len(probabilities_hnk)
    entropy_hn = _entropy(probabilities_hnk)
    sums = torch.zeros(heads, heads, dtype=torch.float64, device=probabilities_hnk.device)
    for i in range(heads - 1):
        middle = (probabilities_hnk[i + 1 :] + probabilities_hnk[i]).mul_(0.5)
        # Rounding can make the divergence of equal heads slightly negative.
        sums[i, i + 1 :] = (_entropy(middle) - (entropy_hn[i + 1 :] + entropy_hn[i]) / 2).clamp_min(0).sum(1)
    return sums + sums.T


def _entropy(rows_hnk: Tensor) -> Tensor:
    """Return the entropy of every row in nats (h x n), float64; a probability of zero contributes zero."""
    tiny = torch.finfo(rows_hnk.dtype).tiny
    return rows_hnk.clamp_min(tiny).log_().mul_(rows_hnk).sum(-1).double().neg_()


def head_distances(
    stream: BlockStream,
    rows: Tensor | Rows,
    *,
    blocks: range | None = None,
    watcher: Watcher | None = None,
) -> dict[int, Tensor]:
    """Return the mean distances between the attention probabilities of all pairs of query heads in each block.

    Args:
        stream: The dense model.
        rows: Calibration tokens (rows x length), or several groups of them with token weights.
        blocks: Indices of the blocks; by default all.
        watcher: Display of progress.

    Returns:
        For each block with an attention, the mean over rows and positions (h x h, float64, on the CPU).

    Raises:
        SecateurError: The attention of this model cannot be observed, or activations are NaN or infinite.
    """
    blocks = blocks if blocks is not None else range(len(stream))
    watcher, rows = watcher or Silent(), Rows.of(rows)
    tokens = sum(weight * group.numel() for group, weight in zip(rows.groups, rows.weights, strict=True))
    rows = stream.local_rows(rows)
    result: dict[int, Tensor] = {}
    any_free = any(not block.heads_locked for block in stream.blocks)
    config = stream.model.config
    with stream.arena() as arena, _watched_attention(config) as parts:
        hidden = stream.embed(rows, arena)
        for index in watcher.track(range(blocks.stop), "Compare heads"):
            block = stream.blocks[index]
            if not block.loses_heads and not any_free:
                raise SecateurError(f"heads cannot be compared, because {block.heads_locked}")
            compared = block.find("heads") if index in blocks and block.loses_heads else None
            heads = compared.units if compared else 0
            sums = [torch.zeros(0, heads, heads, dtype=torch.float64, device=stream.device)]
            with stream.filled(index) as layer:
                if compared and _eager_function(module := layer.get_submodule(compared.path or "")) is None:
                    name = type(module).__name__
                    raise SecateurError(f"the attention of {name} cannot be observed; use another criterion")
                for batch in rows.batches():
                    config._attn_implementation = ATTENTION_NAME if compared and batch.weight else "eager"
                    hidden[batch] = stream.run_through(index, layer, hidden[batch], batch.group)
                    if compared and batch.weight:
                        sums.append(batch.weight * torch.stack(parts).sum(0, keepdim=True))
                        parts.clear()
            if compared:
                result[index] = (stream.processes.gather(torch.cat(sums)).sum(0) / tokens).cpu()
    return result


@contextmanager
def _watched_attention(config: Any) -> Iterator[list[Tensor]]:
    """Let a model compute attention by the eager function, and register `ATTENTION_NAME`, which also records distances.

    The eager function needs explicit masks, which transformers omits for other attention functions.

    Yields:
        List to which the function appends the distances between heads (h x h), one tensor for each chunk of query
        positions. Keys after the last position of a chunk are masked for all its positions, so they are left out.
    """
    parts: list[Tensor] = []

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        eager = _eager_function(module)
        rows, heads, length, _ = query.shape
        step = max(1, CHUNK // (rows * heads * length))
        outputs = []
        for start in range(0, length, step):
            stop = min(start + step, length)
            mask_part = None if mask is None else mask[..., start:stop, :stop]
            output, probabilities = eager(
                module, query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], mask_part, **options
            )
            outputs.append(output)
            parts.append(jensen_shannon(probabilities.transpose(0, 1).flatten(1, 2)))
        return torch.cat(outputs, 1), None

    before, config._attn_implementation = config._attn_implementation, "eager"
    ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME] = attend
    try:
        yield parts
    finally:
        config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME]


def _eager_function(module: nn.Module) -> Any:
    """Return the eager attention function in the file of an attention's class; None if the file has none."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
