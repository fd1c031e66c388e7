"""The vocabulary that a run keeps: the choice of tokens, the smaller checkpoint, and what the choice costs."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from secateur.base.errors import SecateurError
from secateur.base.services import Services
from secateur.base.words import format_count
from secateur.commands.options import Options
from secateur.model.checkpoint import Checkpoint
from secateur.text.calibration import Portion, check_calibration, text_ids
from secateur.text.sources import RANDOM, SELF
from secateur.vocabulary.bits_per_byte import bits_per_byte
from secateur.vocabulary.cut import cut_vocabulary
from secateur.vocabulary.kept import KeptTokens
from secateur.vocabulary.scripts import parse_scripts
from secateur.vocabulary.selection import Selection
from secateur.vocabulary.side_files import ids_in_configs
from secateur.vocabulary.tokenizer import read_tokenizer
from secateur.vocabulary.wanted import Wanted, parse_vocabulary

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


@dataclass(frozen=True)
class Cutter:
    """A model with its whole vocabulary, and the text by which tokens are chosen."""

    checkpoint: Checkpoint
    selection: Selection
    counts: dict[int, int]
    """Occurrences of each token in the counted part of the calibration text; empty without such a text."""
    held_out: str
    """The rest of the calibration text; empty without such a text."""
    length: int
    """Tokens in a row of the rest."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, options: Options, wanted: Wanted) -> "Cutter":
        """Read the tokenizer, and the calibration text if the choice of tokens depends on it.

        Raises:
            SecateurError: The tokenizer cannot be cut, or there is no calibration text.
        """
        selection = Selection(
            read_tokenizer(checkpoint.side_folder), checkpoint.config.vocab_size, ids_in_configs(checkpoint)
        )
        counts, held_out = _read_text(checkpoint, options) if wanted.reads_text else ({}, "")
        return cls(checkpoint, selection, counts, held_out, options.length)

    def choose(self, wanted: Wanted) -> KeptTokens:
        """Return the tokens to keep.

        Raises:
            SecateurError: There is no such script, or the tokens that must be kept are more than the number.
        """
        selection = self.selection
        if wanted.scripts:
            return selection.by_scripts(parse_scripts(wanted.scripts, selection.tokenizer.scripts()))
        if wanted.least:
            return selection.by_text(self.counts, wanted.least)
        return selection.by_number(wanted.number or round(wanted.share * selection.rows), self.counts)

    def cut(self, kept: KeptTokens) -> Checkpoint:
        """Return the checkpoint with some of its tokens; the whole one if they are all of them."""
        whole = len(kept.ids) == self.selection.rows
        return self.checkpoint if whole else cut_vocabulary(self.checkpoint, self.selection.tokenizer, kept)

    def bits_per_byte(self, checkpoint: Checkpoint, device: torch.device, services: Services) -> float:
        """Return the bits per byte of the text that was not counted."""
        return bits_per_byte(checkpoint, self.held_out, length=self.length, device=device, services=services)


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
        cutter = Cutter.of(checkpoint, options, wanted)
        kept = cutter.choose(wanted)
        cut = cutter.cut(kept)
    if not cutter.selection.tokenizer.keeps_all_text:
        watcher.note("Characters without a token become the unknown token, because this tokenizer has no bytes")
    if cut is checkpoint:
        watcher.note(f"All {rows:,} tokens are kept: --vocabulary {options.vocabulary} leaves none out")
        return checkpoint, None
    scored = [] if wanted.scripts else [cutter.bits_per_byte(one, device, services) for one in (checkpoint, cut)]
    bits = (scored[0], scored[1]) if scored else None
    vocabulary = KeptVocabulary(options.vocabulary, (rows, len(kept.ids)), cut.cut_entries, bits)
    watcher.note(vocabulary.describe())
    return cut, vocabulary


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
    check_calibration(options.calibration, length=options.length, max_positions=checkpoint.max_positions)
    tokenizer = checkpoint.tokenizer()
    kinds = text_ids(tokenizer, options.calibration, checkpoint.config.vocab_size)
    counted, rest = ([portion.of(ids) for ids in kinds] for portion in (Portion(0.0, COUNTED), Portion(COUNTED, 1.0)))
    each = max(1, SCORED_TOKENS // len(rest))
    held_out = "\n\n".join(tokenizer.decode(ids[:each].tolist(), skip_special_tokens=True) for ids in rest)
    if (size := len(tokenizer.encode(held_out, add_special_tokens=False))) < options.length:
        raise SecateurError(
            f"{options.calibration}: too short, a tenth of it is set aside to measure what the cut costs, which has "
            f"{size:,} tokens and must fill a row of {options.length}; give a longer text, or a smaller --length"
        )
    ids, times = torch.cat(counted).unique(return_counts=True)
    return dict(zip(ids.tolist(), times.tolist(), strict=True)), held_out
