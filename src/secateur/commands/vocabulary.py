"""The vocabulary that a run keeps: the choice of tokens, the smaller checkpoint, and what the choice costs."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from secateur.base.errors import SecateurError
from secateur.base.services import Services
from secateur.base.words import format_count
from secateur.commands.options import Options
from secateur.model.checkpoint import Checkpoint
from secateur.text.calibration import Portion, text_ids
from secateur.text.sources import RANDOM, SELF
from secateur.vocabulary.cut import cut_vocabulary
from secateur.vocabulary.kept import KeptTokens
from secateur.vocabulary.price import bits_per_byte
from secateur.vocabulary.scripts import parse_scripts
from secateur.vocabulary.selection import Selection
from secateur.vocabulary.side_files import ids_in_configs
from secateur.vocabulary.tokenizer import read_tokenizer
from secateur.vocabulary.wanted import Wanted, parse_vocabulary

COUNTED = 0.9
"""Share of the calibration text whose tokens are counted; the rest shows what the choice of tokens costs."""
PRICED_TOKENS = 4096
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
    checkpoint: Checkpoint, options: Options, device: torch.device, services: Services
) -> tuple[Checkpoint, KeptVocabulary | None]:
    """Return the checkpoint with the tokens that the options keep; None in the second place if they keep all.

    Args:
        checkpoint: The model with its whole vocabulary.
        options: Vocabulary, calibration text and length of rows.
        device: Device on which the cost is measured.
        services: Progress output and processes.

    Raises:
        SecateurError: There are no such tokens, or the tokenizer cannot be cut.
    """
    wanted, rows, watcher = parse_vocabulary(options.vocabulary), checkpoint.config.vocab_size, services.watcher
    if wanted is None:
        return checkpoint, None
    with watcher.busy("Cutting the vocabulary"), services.processes.first_rank_first():
        tokenizer = read_tokenizer(checkpoint.side_folder)
        counts, held_out = _read_text(checkpoint, options) if wanted.reads_text else ({}, "")
        kept = _choose(wanted, Selection(tokenizer, rows, ids_in_configs(checkpoint)), counts)
        if len(kept.ids) == rows:
            watcher.note(f"All {rows:,} tokens are kept: --vocabulary {options.vocabulary} leaves none out")
            return checkpoint, None
        cut = cut_vocabulary(checkpoint, tokenizer, kept)
    size: dict[str, Any] = {"length": options.length, "device": device, "services": services}
    price = (bits_per_byte(checkpoint, held_out, **size), bits_per_byte(cut, held_out, **size)) if held_out else None
    vocabulary = KeptVocabulary(options.vocabulary, (rows, len(kept.ids)), cut.cut_entries, price)
    watcher.note(vocabulary.describe())
    if not tokenizer.keeps_all_text:
        watcher.note("Characters without a token become the unknown token, because this tokenizer has no bytes")
    return cut, vocabulary


def _choose(wanted: Wanted, selection: Selection, counts: dict[int, int]) -> KeptTokens:
    """Return the tokens to keep.

    Args:
        wanted: What the user asks for.
        selection: The vocabulary.
        counts: How often the calibration text has each token that it has.

    Raises:
        SecateurError: There is no such script, or the tokens that must be kept are more than the number.
    """
    if wanted.scripts:
        return selection.by_scripts(parse_scripts(wanted.scripts, selection.tokenizer.scripts()))
    if wanted.least:
        return selection.by_text(counts, wanted.least)
    return selection.by_number(wanted.number or round(wanted.share * selection.rows), counts)


def _read_text(checkpoint: Checkpoint, options: Options) -> tuple[dict[int, int], str]:
    """Return how often the calibration text has each token that it has, and text that was not counted.

    Raises:
        SecateurError: The calibration is not a text.
    """
    if options.calibration in (RANDOM, SELF):
        raise SecateurError(
            f"--vocabulary {options.vocabulary} counts the tokens of the calibration text, but --calibration is "
            f"{options.calibration}; name a text, or scripts such as --vocabulary latin"
        )
    tokenizer, size = checkpoint.tokenizer(), checkpoint.config.vocab_size
    kinds = text_ids(tokenizer, options.calibration, size)
    counted, rest = ([portion.of(ids) for ids in kinds] for portion in (Portion(0.0, COUNTED), Portion(COUNTED, 1.0)))
    each = max(1, PRICED_TOKENS // len(rest))
    held_out = "\n\n".join(tokenizer.decode(ids[:each].tolist(), skip_special_tokens=True) for ids in rest)
    ids, times = torch.cat(counted).unique(return_counts=True)
    return dict(zip(ids.tolist(), times.tolist(), strict=True)), held_out
