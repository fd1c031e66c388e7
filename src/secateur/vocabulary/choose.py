"""The vocabulary that a run keeps: the choice of tokens, the smaller checkpoint, and what the choice costs."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from secateur.base.device import fast_dtype
from secateur.base.errors import SecateurError
from secateur.base.services import Services
from secateur.base.words import format_count
from secateur.checkpoints.checkpoint import Checkpoint
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.survey.loss import mean_loss
from secateur.text.calibration import Portion, check_calibration, rows_of_text, text_ids
from secateur.text.sources import RANDOM, SELF
from secateur.vocabulary.cut import cut_vocabulary
from secateur.vocabulary.selection import select
from secateur.vocabulary.side_files import ids_in_configs
from secateur.vocabulary.tokenizer import read_tokenizer
from secateur.vocabulary.wanted import parse_vocabulary

COUNTED = 0.9
"""Share of the calibration text whose tokens are counted; the rest shows what the choice of tokens costs."""
SCORED_TOKENS = 4096
"""Number of tokens of the rest, by the original tokenizer, on which the cost is measured."""


@dataclass(frozen=True)
class KeptVocabulary:
    """The tokens that a run keeps; pairs are before and after."""

    wanted: str
    """Value of `--vocabulary`."""
    tokens: tuple[int, int]
    """Number of rows of the embedding."""
    parameters: int
    """Number of parameters that were cut."""
    bits_per_byte: tuple[float, float] | None
    """Bits per byte of calibration text whose tokens were not counted; None where the choice ignores the text."""

    def as_record(self) -> dict[str, Any]:
        """Return the entry of secateur.json."""
        return asdict(self)

    def describe(self) -> str:
        """Return a sentence for the user."""
        before, after = self.tokens
        size = f"Keeping {after:,} of {before:,} tokens, which removes {format_count(self.parameters, 1)} parameters"
        if self.bits_per_byte is None:
            return size
        dense, cut = self.bits_per_byte
        return f"{size}; bits per byte of text whose tokens were not counted: {dense:.3f} before, {cut:.3f} after"


def with_vocabulary(
    checkpoint: Checkpoint,
    vocabulary: str,
    *,
    calibration: str,
    length: int,
    device: torch.device,
    services: Services,
) -> tuple[Checkpoint, KeptVocabulary | None]:
    """Return the checkpoint with the tokens that are kept; None in the second place if these are all.

    Args:
        checkpoint: The model with its whole vocabulary.
        vocabulary: Value of `--vocabulary`.
        calibration: Text whose tokens are counted.
        length: Tokens in each row on which the cost is measured.
        device: Device on which the cost is measured.
        services: Progress output and processes.

    Raises:
        SecateurError: There are no such tokens, or the tokenizer cannot be cut.
    """
    wanted, rows, watcher = parse_vocabulary(vocabulary), checkpoint.config.vocab_size, services.watcher
    if wanted is None:
        return checkpoint, None
    with watcher.busy("Cutting the vocabulary"), services.processes.first_rank_first():
        tokenizer = read_tokenizer(checkpoint.side_folder)
        must_keep = ids_in_configs(checkpoint)
        counts, held_out = ({}, "") if wanted.scripts else _read_text(checkpoint, vocabulary, calibration, length)
        kept = select(tokenizer, rows, wanted, counts, must_keep)
        cut = checkpoint if len(kept.ids) == rows else cut_vocabulary(checkpoint, tokenizer, kept)
    if not tokenizer.keeps_all_text:
        watcher.note("Characters without a token become the unknown token, because this tokenizer has no bytes")
    if cut is checkpoint:
        watcher.note(f"All {rows:,} tokens are kept: --vocabulary {vocabulary} leaves none out")
        return checkpoint, None
    bits = None
    if not wanted.scripts:
        before, after = (
            bits_per_byte(one, held_out, length=length, device=device, services=services) for one in (checkpoint, cut)
        )
        bits = before, after
    chosen = KeptVocabulary(vocabulary, (rows, len(kept.ids)), cut.cut_entries, bits)
    watcher.note(chosen.describe())
    return cut, chosen


def _read_text(checkpoint: Checkpoint, vocabulary: str, calibration: str, length: int) -> tuple[dict[int, int], str]:
    """Return how often the calibration text has each token that it has, and text that was not counted.

    Raises:
        SecateurError: The calibration is not a text.
    """
    if calibration in (RANDOM, SELF):
        raise SecateurError(
            f"--vocabulary {vocabulary} counts the tokens of the calibration text, but --calibration is "
            f"{calibration}; name a text, or scripts such as --vocabulary latin"
        )
    check_calibration(calibration, length=length, max_positions=checkpoint.max_positions)
    tokenizer = checkpoint.tokenizer()
    kinds = text_ids(tokenizer, calibration, checkpoint.config.vocab_size)
    counted, rest = ([portion.of(ids) for ids in kinds] for portion in (Portion(0.0, COUNTED), Portion(COUNTED, 1.0)))
    each = max(1, SCORED_TOKENS // len(rest))
    held_out = "\n\n".join(tokenizer.decode(ids[:each].tolist(), skip_special_tokens=True) for ids in rest)
    if (size := len(tokenizer.encode(held_out, add_special_tokens=False))) < length:
        raise SecateurError(
            f"{calibration}: too short, a tenth of it is set aside to measure what the cut costs, which has "
            f"{size:,} tokens and must fill a row of {length}; give a longer text, or a smaller --length"
        )
    ids, times = torch.cat(counted).unique(return_counts=True)
    return dict(zip(ids.tolist(), times.tolist(), strict=True)), held_out


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
