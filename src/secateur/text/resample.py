"""Resampled rows: calibration rows half of whose tokens the dense model has drawn anew.

Resampled rows need no further text. One pass of the dense model gives the distribution of the next token at every
position, and about half of the tokens are drawn again from these distributions. Every draw is conditioned on the tokens
of the original text before it, so that all positions are drawn independently and each block is read only once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.model.pass_checkpoint import PassCheckpoint
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream

SEED_STRIDE = 0x9E3779B1
"""Distance between the seeds of successive sets, far from the small seeds that people choose."""
POSITIONS_AT_ONCE = 128
"""Number of positions whose logits are in memory at a time; a position has as many logits as the vocabulary has
tokens."""
RESAMPLED_SHARE = 0.5
"""Expected share of tokens drawn anew; with a larger share, neighbouring tokens would depend less on each other."""


def resample_tokens(
    stream: BlockStream,
    text: Tensor,
    *,
    count: int = 1,
    seed: int = 0,
    checkpoint: PassCheckpoint | None = None,
) -> Tensor:
    """Draw about half of the tokens of calibration rows anew, from the dense model's own distributions.

    Args:
        stream: The dense model.
        text: Token ids (rows x length).
        count: Number of sets of resampled rows. The draws of a set do not depend on the number of sets.
        seed: Seed of the draws.
        checkpoint: Saves the stream after each block; a resumed run continues after the last block saved.

    Returns:
        Token ids (count x rows x length). The first token of every row stays.

    Raises:
        SecateurError: Logits are not finite.
    """
    checkpoint = checkpoint or PassCheckpoint(stream.services)
    all_rows = Rows.of(text)
    rows = stream.local_rows(all_rows)
    (mine,) = stream.local_spans(all_rows)
    generators = [torch.Generator().manual_seed((seed + SEED_STRIDE * index) % 2**32) for index in range(count)]
    result = text.repeat(count, 1, 1)
    # The result is the sum over all processes, so the rows of other processes are zero here.
    result[:, : mine.start], result[:, mine.stop :] = 0, 0
    with stream.arena() as arena, stream.fast_products():
        hidden = stream.embed(rows, arena)
        for index in checkpoint.blocks(len(stream), "Resample", lambda: [hidden]):
            with stream.filled(index) as layer:
                stream.advance(index, layer, rows, hidden)
        with stream.head() as head:
            for row in stream.services.watcher.track(range(len(text)), "Draw tokens"):
                # Every process draws the random numbers of every row, so that all processes have the same sequence.
                draws = torch.stack([torch.rand(2, text.shape[1] - 1, generator=generator) for generator in generators])
                if mine.start <= row < mine.stop:
                    _resample_row(stream, head, hidden.parts[0][row - mine.start], draws, result[:, row])
    stream.processes.all_reduce(result)
    return result


def _resample_row(
    stream: BlockStream, head: Callable[[Tensor], Tensor], hidden: Tensor, draws: Tensor, result: Tensor
) -> None:
    """Replace tokens of one row, in all sets.

    Args:
        hidden: Residual stream of the row after the last block (length x width).
        draws: Uniform random numbers (sets x 2 x length - 1): the first decides whether the next token is drawn anew,
            the second which token it becomes.
        result: Token ids to change in place (sets x length).
    """
    replaced, levels = draws[:, 0] < RESAMPLED_SHARE, draws[:, 1]
    for places in replaced.any(0).nonzero()[:, 0].split(POSITIONS_AT_ONCE):
        with stream.rounded_sums():
            logits = head(hidden[places])
        cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64).cpu()
        if not torch.isfinite(cumulative[:, -1]).all():
            raise SecateurError(f"{stream.checkpoint.source}: NaN or infinite logits; check the weights")
        for tokens, anew, level in zip(result, replaced, levels, strict=True):
            drawn = torch.searchsorted(cumulative, level[places, None].double() * cumulative[:, -1:], right=True)
            chosen = anew[places]
            tokens[1 + places[chosen]] = drawn[chosen, 0]
