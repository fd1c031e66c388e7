"""More calibration rows than were drawn from the text: the same rows, in which the dense model has written tokens anew.

They cost no text: one pass of the dense model gives a distribution for every position, and a part of the tokens is
drawn anew from these. Each draw sees what the text said before it, so that no position waits for another and each block
is read once.
"""

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.model.pass_checkpoint import PassCheckpoint
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream

APART = 0x9E3779B1
AT_ONCE = 128
"""Positions whose logits are held: they are larger than their stream by the vocabulary over the width."""
SHARE = 0.5
"""Of the tokens that are drawn anew; more of them leave less of what neighbours have to do with each other."""


def rewritten(
    stream: BlockStream,
    text: Tensor,
    *,
    copies: int = 1,
    seed: int = 0,
    checkpoint: PassCheckpoint | None = None,
) -> Tensor:
    """Rows that the dense model has partly written.

    Args:
        text: token ids (rows x length).
        copies: how often each row is rewritten, each time with draws of its own, which more copies do not change.
        checkpoint: saves the stream behind each block, and resumes behind the last one that was saved.

    Returns:
        Token ids (copies x rows x length); first tokens stay.
    """
    checkpoint = checkpoint or PassCheckpoint(stream.services)
    every = Rows.of(text)
    rows, processes = stream.own(every), stream.processes
    (mine,) = stream.spans(every)
    # Seeds have 32 bits; those of further copies lie far from the ones that people take.
    generators = [torch.Generator().manual_seed((seed + APART * copy) % 2**32) for copy in range(copies)]
    result = text.repeat(copies, 1, 1)
    result[:, : mine.start], result[:, mine.stop :] = 0, 0
    with stream.arena() as arena, stream.quick():
        hidden = stream.embed(rows, arena)
        for index in checkpoint.blocks(len(stream), "Rewrite", lambda: [hidden]):
            with stream.filled(index) as layer:
                stream.advance(index, layer, rows, hidden)
        with stream.head() as head:
            for row in stream.services.watcher.track(range(len(text)), "Draw"):
                levels = [torch.rand(2, text.shape[1] - 1, generator=generator) for generator in generators]
                if not mine.start <= row < mine.stop:
                    continue
                wanted = [first < SHARE for first, _ in levels]
                for places in torch.stack(wanted).any(0).nonzero()[:, 0].split(AT_ONCE):
                    with stream.rounded():
                        logits = head(hidden.parts[0][row - mine.start][places])
                    shares = logits.softmax(-1).cumsum(-1, dtype=torch.float64).cpu()
                    if not torch.isfinite(shares[:, -1]).all():
                        raise SecateurError(
                            f"{stream.checkpoint.source}: NaN or infinite logits; are the weights intact?"
                        )
                    for copy, anew, (_, level) in zip(result[:, row], wanted, levels, strict=True):
                        drawn = torch.searchsorted(shares, level[places, None].double() * shares[:, -1:], right=True)
                        chosen = anew[places]
                        copy[1 + places[chosen]] = drawn[chosen, 0]
    processes.all_reduce(result)
    return result
