"""More calibration rows than were drawn from the text: the same rows, in which the dense model has written tokens anew.

They cost no text: one pass of the dense model gives a distribution for every position, and a part of the tokens is
drawn anew from these. Each draw sees what the text said before it, so that no position waits for another and each block
is read once.
"""

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.progress import Silent, Watcher
from secateur.model.arena import Arena
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream

APART = 0x9E3779B1
FULL = torch.float32
POSITIONS = 512
"""At which tokens are drawn together."""
SHARE = 0.5
"""Of the tokens that are drawn anew; more of them leave less of what neighbours have to do with each other."""


def rewritten(
    stream: BlockStream, text: Tensor, *, copies: int = 1, seed: int = 0, watcher: Watcher | None = None
) -> Tensor:
    """Rows that the dense model has partly written.

    Args:
        text: token ids (rows x length).
        copies: how often each row is rewritten, each time with draws of its own, which more copies do not change.

    Returns:
        Token ids (copies x rows x length); first tokens stay.
    """
    watcher = watcher or Silent()
    rows = Rows.of(text)
    # Seeds have 32 bits; those of further copies lie far from the ones that people take.
    generators = [torch.Generator().manual_seed((seed + APART * copy) % 2**32) for copy in range(copies)]
    result = text.repeat(copies, 1, 1)
    with Arena() as arena, stream.quick():
        hidden = stream.embed(rows, arena)
        for index in watcher.track(range(len(stream)), "Rewrite"):
            with stream.filled(index) as layer:
                stream.advance(index, layer, rows, hidden)
        shape = text[:, 1:].shape
        dice = [torch.rand(2, *shape, generator=generator) for generator in generators]
        anew = [chance < SHARE for chance, _ in dice]
        with stream.head() as head, torch.autocast(stream.device.type, stream.products, stream.products != FULL):
            # Some positions at a time: their logits are larger than their stream by the vocabulary over the width.
            for some in watcher.track(torch.stack(anew).any(0).nonzero().split(POSITIONS), "Draw"):
                row, place = some.T
                logits = head(hidden.parts[0][row, place]).float()
                shares = (logits - logits.amax(-1, keepdim=True)).exp_().cumsum(-1)
                if not torch.isfinite(shares[:, -1]).all():
                    raise SecateurError(f"{stream.checkpoint.source}: NaN or infinite logits; are the weights intact?")
                for copy, chosen, (_, chance) in zip(result, anew, dice, strict=True):
                    here = chosen[row, place]
                    at = chance[row, place, None].to(shares.device) * shares[:, -1:]
                    drawn = torch.searchsorted(shares, at)[:, 0].cpu()
                    copy[row[here], place[here] + 1] = drawn[here]
    return result
