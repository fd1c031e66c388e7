"""Rows that each fit of the refit takes beside the samples: more tokens to find a module's unknowns from.

A refit has as many unknowns as a module keeps inputs, and few tokens. Rows that the dense model finds likely are nearly
as good to it as the text's: the text's own, partly rewritten (`secateur.steps.rewrite`), or such as the model writes
from nothing (`secateur.self_calibration`), which are of all kinds of text and need the whole model in memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from secateur.errors import SecateurError
from secateur.meters import cache_meter
from secateur.options import REWRITTEN, SELF, Options
from secateur.progress import Watcher
from secateur.self_calibration import memory, opening, self_rows, writing_bytes
from secateur.steps.rewrite import APART, rewritten
from secateur.stream import BlockStream

ROOM = 0.5
"""Of all memory that there is, what a model may take to write where nobody asked for it."""


def settled(options: Options, stream: BlockStream, tokenizer: Any) -> Options:
    """The options with where more rows come from: from the model itself if it can write and leaves enough memory.

    What is free at the moment does not count: the same request gives the same result on the same machine.
    """
    if options.more is not None:
        return options
    checkpoint, cached = stream.checkpoint, cache_meter(stream, stream.checkpoint.dtype).dense
    writes = writing_bytes(checkpoint, length=options.length, cache_bytes=cached) <= ROOM * memory(stream.device)[1]
    try:
        opening(checkpoint, tokenizer)
    except SecateurError:
        writes = False
    return replace(options, more=SELF if writes else REWRITTEN)


def more_rows(stream: BlockStream, options: Options, text: Tensor, *, watcher: Watcher) -> Tensor:
    """The rows of all fits.

    Args:
        stream: an open model.
        options: how many fits, of which kind of rows, which are settled, and the seed.
        text: token ids that all fits take (rows x length).
        watcher: told about progress.

    Returns:
        Token ids (fits x rows x length).

    Raises:
        SecateurError: the model cannot write.
    """
    fits, seed = options.fits_more, options.seed
    if options.more != SELF:
        return rewritten(stream, text, copies=fits, seed=seed, watcher=watcher)
    rows = self_rows(
        stream.checkpoint,
        stream.checkpoint.tokenizer(),
        samples=fits * len(text),
        length=text.shape[1],
        # Those of `--calibration self` are drawn with the seed itself.
        seed=(seed + APART) % 2**32,
        temperature=options.temperature,
        device=stream.device,
        watcher=watcher,
    )
    return rows.view(fits, *text.shape)
