"""Rows that each fit of the refit takes beside the samples: more tokens to find a module's unknowns from.

A refit has as many unknowns as a module keeps inputs, and few tokens. Rows that the dense model finds likely are nearly
as good to it as the text's: the text's own, partly rewritten (`secateur.text.rewrite`), or such as the model writes
from nothing (`secateur.text.self_calibration`), which are of all kinds of text and need the whole model in memory.
"""

from __future__ import annotations

from torch import Tensor

from secateur.base.progress import Watcher
from secateur.commands.options import SELF, Options
from secateur.model.stream import BlockStream
from secateur.text.rewrite import APART, rewritten
from secateur.text.self_calibration import self_rows


def more_rows(stream: BlockStream, options: Options, text: Tensor, *, watcher: Watcher) -> Tensor:
    """The rows of all fits.

    Args:
        stream: an open model.
        options: how many fits, of which kind of rows, and the seed.
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
