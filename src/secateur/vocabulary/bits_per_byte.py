"""Loss from a smaller vocabulary: bits per byte of a text, split into tokens by the old and by the new tokenizer."""

import math

import torch

from secateur.base.device import fast_dtype
from secateur.base.services import Services
from secateur.model.checkpoint import Checkpoint
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.survey.loss import mean_loss
from secateur.text.calibration import rows_of_text


def bits_per_byte(checkpoint: Checkpoint, text: str, *, length: int, device: torch.device, services: Services) -> float:
    """Return the bits per UTF-8 byte of a text: its negative log-likelihood in bits over its bytes.

    The model runs block by block, so that only one block is in memory.

    Args:
        checkpoint: The model.
        text: A text that fills a row.
        length: Tokens in a row.
        device: Device to compute on.
        services: Progress output, and processes that share the rows.
    """
    scored = rows_of_text(checkpoint.tokenizer(), text, length=length, vocab_size=checkpoint.config.vocab_size)
    stream, rows = BlockStream(checkpoint, device=device, services=services), Rows.of(scored.ids)
    mine = stream.local_rows(rows)
    with stream.arena() as arena, stream.multiplying_in(fast_dtype(device)):
        hidden = stream.embed(mine, arena)
        for index in services.watcher.track(range(len(stream)), "Measure the vocabulary"):
            with stream.filled(index) as layer:
                stream.advance(index, layer, mine, hidden)
        loss = mean_loss(stream, rows, 0, hidden)
    tokens = scored.ids.numel() - len(scored.ids)
    return loss * tokens / math.log(2) / scored.bytes
