"""Rows of token ids: random windows of a text for calibration, consecutive rows for evaluation.

Statistics and perplexities are comparable only if rows are built in the same way. This file decides how documents are
joined, where a window may begin, and whether a row begins with BOS. Sources of text are in `secateur.text.documents`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.base.errors import SecateurError
from secateur.checkpoints.tokens import EncodedText, begins_with_bos, encode
from secateur.text.data_sets import MAX_CHARACTERS, Split
from secateur.text.documents import is_file, read_documents
from secateur.text.general import general_documents, general_rows, spread
from secateur.text.sources import GENERAL, RANDOM, STDIN, text_added_to_general
from secateur.text.windows import checked_ids, windows

_JOIN = "\n\n"
_CHARACTERS_PER_TOKEN = 16
"""Number of characters read for each token that evaluation needs; this is enough in every script."""
_MIN_CHARACTERS = 1_000_000
"""Smallest number of characters read for evaluation, for texts with unusual words."""
_CHARACTERS_AT_ONCE = 1_000_000
"""Number of characters that are tokenized together; a tokenizer needs 200 times as many bytes of memory."""
_cache: ContextVar[dict[Any, dict[str, Tensor]] | None] = ContextVar("_cache", default=None)
"""Token ids of sources that were read inside `cached_token_ids`."""


@dataclass(frozen=True)
class SampleOption:
    """Option that sets the number of rows, which the error message about a short text advises to change."""

    name: str = "samples"
    extra_rows: int = 0
    """Number of rows that are drawn beyond those that the option counts."""
    rows_per_text_row: int = 1
    """Number of rows drawn for each row that comes from the text."""

    def largest(self, text_rows: int) -> int:
        """Return the largest value of the option for which a text with this number of rows is long enough."""
        return self.rows_per_text_row * text_rows - self.extra_rows


SAMPLES = SampleOption()
"""The option `--samples`, which counts all rows."""


class Portion(NamedTuple):
    """Part of a text, as shares of its tokens."""

    start: float = 0.0
    end: float = 1.0

    def of(self, ids: Tensor) -> Tensor:
        """Return this part of a text (tokens)."""
        return ids[round(self.start * len(ids)) : round(self.end * len(ids))]


WHOLE = Portion()
"""All of a text."""


def check_calibration(source: str, *, samples: int = 1, length: int, max_positions: int | None = None) -> None:
    """Check a source and the size of its rows without reading any text, before a large model is opened.

    Args:
        source: The source as in `read_documents`, or `random`; a file must exist and have a known extension.
        samples: Number of rows, at least 1.
        length: Tokens in a row, at least 2: a row of one token predicts nothing.
        max_positions: The longest row that the model's positions allow; None for no limit.

    Raises:
        SecateurError: The source or a number is wrong.
    """
    if samples < 1:
        raise SecateurError(f"samples is {samples}; it must be at least 1")
    if length < 2:
        raise SecateurError(f"length is {length}; it must be at least 2")
    if max_positions is not None and length > max_positions:
        raise SecateurError(
            f"length is {length}, but the model has only {max_positions} positions: choose a length of at most "
            f"{max_positions}"
        )
    is_file(source)


def calibration_rows(
    tokenizer: PreTrainedTokenizerBase | None,
    source: str,
    *,
    samples: int,
    length: int,
    seed: int,
    vocab_size: int,
    max_positions: int | None = None,
    option: SampleOption = SAMPLES,
    portion: Portion = WHOLE,
    to_train: bool = False,
) -> Tensor:
    """Draw random rows from a source; the same seed gives the same rows.

    The text is cut into windows from a random offset on, and windows are drawn without repetition, so that no token is
    used twice. A row begins with BOS exactly if the tokenizer would add it.

    Args:
        tokenizer: The model's tokenizer; may be None for `random`.
        source: A source as in `read_documents`; `general` for the package's own text of several kinds; `general+TEXT`
            for half of each; or `random` for token ids drawn uniformly. If there is a tokenizer, `random` leaves
            special tokens out.
        samples: Number of rows.
        length: Tokens in a row, BOS included.
        vocab_size: Number of rows of the model's embedding; every id is below it.
        max_positions: The longest row that the model's positions allow; None for no limit.
        option: The option that sets the number of rows, for error messages.
        portion: The part of the text from which rows are drawn.
        to_train: Whether a model is trained on the rows. Then `general` has more text, all tokens of which are drawn
            alike, and no rows that hold a passage twice. A text with too few tokens is drawn from several times, each
            time cut into other rows.

    Returns:
        Token ids, int64 (samples x length).

    Raises:
        SecateurError: The source cannot be read or is too short, a size is out of range, or the tokenizer gives ids
            that the model does not have.

    Example:
        >>> rows = calibration_rows(None, "random", samples=4, length=16, seed=0, vocab_size=128)
        >>> rows.shape, rows.dtype
        (torch.Size([4, 16]), torch.int64)
    """
    check_calibration(source, samples=samples, length=length, max_positions=max_positions)
    bos = _bos(tokenizer, vocab_size)
    body = length - len(bos)

    def drawn(source: str, count: int, option: SampleOption) -> Tensor:
        """Draw rows without their BOS (count x body)."""
        generator = torch.Generator().manual_seed(seed)
        if source == RANDOM:
            allowed = _plain_ids(tokenizer, vocab_size)
            return allowed[torch.randint(len(allowed), (count, body), generator=generator)]
        required = _require(tokenizer, source)
        kinds = {kind: portion.of(ids) for kind, ids in _ids_of_kinds(required, source, vocab_size, to_train).items()}
        if source == GENERAL and not to_train:
            return general_rows(kinds, samples=count, body=body, generator=generator)
        ids = torch.cat([*kinds.values()])
        _check_enough(source, ids, 1 if to_train else count, length, len(bos), option)
        return windows(ids, count, body, generator)

    text = text_added_to_general(source)
    if text is None:
        return _with_bos(bos, drawn(source, samples, option))
    half = samples // 2
    halves = [drawn(GENERAL, samples - half, option), drawn(text, half, replace(option, rows_per_text_row=2))]
    return _with_bos(bos, spread(halves))


class ScoredRows(NamedTuple):
    """Consecutive rows of a text, of which every token but the first of each row is scored."""

    ids: Tensor
    """Token ids, int64 (rows x length)."""
    bytes: int
    """Number of UTF-8 bytes of text that the scored tokens cover; see `EncodedText.bytes_of`."""


def consecutive_rows(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    *,
    length: int,
    tokens: int | None,
    vocab_size: int,
    max_positions: int | None = None,
    split: Split = "evaluation",
) -> ScoredRows:
    """Cut the beginning of a source into consecutive rows, as perplexity is usually measured.

    Args:
        tokenizer: The model's tokenizer.
        source: A source as in `read_documents`.
        length: Tokens in a row, BOS included if the tokenizer would add it.
        tokens: Number of tokens in all rows together; None takes the whole text. A shorter text gives fewer rows, and
            an incomplete last row is dropped.
        vocab_size: Number of rows of the model's embedding; every id is below it.
        max_positions: The longest row that the model's positions allow; None for no limit.
        split: The part of a data set that is read.

    Returns:
        At least one row, and the bytes of the scored tokens.

    Raises:
        SecateurError: The source cannot be read or does not fill a row, a size is out of range, or the tokenizer gives
            ids that the model does not have.
    """
    check_calibration(source, length=length, max_positions=max_positions)
    if tokens is not None and tokens < length:
        raise SecateurError(f"tokens is {tokens}, which does not fill one row of length {length}: use more")
    bos = _bos(tokenizer, vocab_size)
    enough = MAX_CHARACTERS if tokens is None else max(_CHARACTERS_PER_TOKEN * tokens, _MIN_CHARACTERS)
    tokenizer = _require(tokenizer, source)
    documents = read_documents(source, tokenizer, split=split, characters=min(MAX_CHARACTERS, enough))
    encoded = EncodedText.of(tokenizer, _JOIN.join(documents))
    ids = checked_ids(encoded.ids, vocab_size)
    _check_enough(source, ids, 1, length, len(bos), SAMPLES)
    return _rows_of(encoded, ids, bos, length, None if tokens is None else tokens // length)


def rows_of_text(tokenizer: PreTrainedTokenizerBase, text: str, *, length: int, vocab_size: int) -> ScoredRows:
    """Cut a text into consecutive rows, as `consecutive_rows` cuts the text of a source.

    Args:
        tokenizer: The model's tokenizer.
        text: A text that fills a row; an incomplete last row is dropped.
        length: Tokens in a row, BOS included if the tokenizer would add it.
        vocab_size: Number of rows of the model's embedding; every id is below it.
    """
    encoded = EncodedText.of(tokenizer, text)
    return _rows_of(encoded, checked_ids(encoded.ids, vocab_size), _bos(tokenizer, vocab_size), length, None)


def _rows_of(encoded: EncodedText, ids: Tensor, bos: Tensor, length: int, most: int | None) -> ScoredRows:
    """Return the tokens of a text as rows of a length, at most a number of rows, with the bytes of scored tokens."""
    body = length - len(bos)
    rows = len(ids) // body if most is None else min(len(ids) // body, most)
    # If BOS comes first, the first token of the text is scored too.
    not_scored = 1 - len(bos)
    scored = sum(encoded.bytes_of(row * body + not_scored, (row + 1) * body) for row in range(rows))
    return ScoredRows(_with_bos(bos, ids[: rows * body].view(rows, body)), scored)


def _bos(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> Tensor:
    """Return BOS if the tokenizer puts it in front of a text, else an empty tensor (int64, 1 or 0 entries)."""
    opening = [int(tokenizer.bos_token_id)] if tokenizer is not None and begins_with_bos(tokenizer) else []
    return checked_ids(opening, vocab_size)


def _with_bos(bos: Tensor, rows: Tensor) -> Tensor:
    return torch.cat([bos.expand(len(rows), -1), rows], dim=1)


def text_ids(
    tokenizer: PreTrainedTokenizerBase, source: str, vocab_size: int, *, to_train: bool = False
) -> list[Tensor]:
    """Return all token ids of a source of text, without `random` and `self`: one tensor for each kind of text in it.

    Args:
        tokenizer: The model's tokenizer.
        source: A source as in `calibration_rows`.
        vocab_size: Number of rows of the model's embedding; every id is below it.
        to_train: Whether `general` has the text that only a training reads.
    """
    parts = [GENERAL, text] if (text := text_added_to_general(source)) else [source]
    return [ids for part in parts for ids in _ids_of_kinds(tokenizer, part, vocab_size, to_train).values()]


@contextmanager
def cached_token_ids() -> Iterator[None]:
    """Read and tokenise each source only once for each tokenizer while the context is open."""
    # A context inside another one uses the other's ids.
    token = _cache.set({} if (current := _cache.get()) is None else current)
    try:
        yield
    finally:
        _cache.reset(token)


def _ids_of_kinds(
    tokenizer: PreTrainedTokenizerBase, source: str, vocab_size: int, to_train: bool
) -> dict[str, Tensor]:
    """Return all ids of each kind of text in a source, int64 (tokens); only `general` has several kinds."""
    cache = {} if (current := _cache.get()) is None else current
    key = (tokenizer.name_or_path, source, vocab_size, to_train)
    if key not in cache:
        is_general = source == GENERAL
        kinds = general_documents(tokenizer, to_train) if is_general else {source: read_documents(source, tokenizer)}
        cache[key] = {
            kind: torch.cat([checked_ids(encode(tokenizer, text), vocab_size) for text in _joined(documents)])
            for kind, documents in kinds.items()
        }
    return cache[key]


def _joined(documents: list[str]) -> Iterator[str]:
    """Yield the documents, joined to texts of about `_CHARACTERS_AT_ONCE` characters."""
    text = ""
    for document in documents:
        if len(text) > _CHARACTERS_AT_ONCE:
            yield text + _JOIN
            text = ""
        text += _JOIN * bool(text) + document
    yield text


def _require(tokenizer: PreTrainedTokenizerBase | None, source: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer, without which a text cannot be read."""
    if tokenizer is None:
        raise SecateurError(f"{source} needs a tokenizer, and the model has none: use {RANDOM}")
    return tokenizer


def _plain_ids(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> Tensor:
    """Return all ids that are no special token and no untrained padding of the embedding, int64 (ids)."""
    if tokenizer is None:
        return torch.arange(vocab_size)
    special = set(tokenizer.all_special_ids)
    special |= {index for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    plain = [index for index in range(min(vocab_size, len(tokenizer))) if index not in special]
    if not plain:
        raise SecateurError("every id of the tokenizer is a special one, so no random ids can be drawn: use a text")
    return torch.tensor(plain, dtype=torch.int64)


def _check_enough(source: str, ids: Tensor, rows: int, length: int, bos: int, option: SampleOption) -> None:
    """Raise `SecateurError` if a text has too few tokens for its rows; the message names sizes for which the text is
    long enough.

    Args:
        ids: Token ids of the text.
        length: Tokens in a row, BOS included.
        bos: Number of BOS tokens in a row.
    """
    body, tokens = length - bos, len(ids)
    if tokens >= rows * body:
        return
    samples, shorter = option.largest(tokens // body), tokens // rows + bos
    advice = [f"{option.name} {samples}"] if rows > 1 and samples > 0 else []
    advice += [f"length {shorter}"] if shorter >= 2 else []
    change = f"use {' or '.join(advice)}, or a longer text" if advice else "use a longer text"
    name = "standard input" if source == STDIN else source
    raise SecateurError(
        f"{name}: too short, it has {tokens:,} tokens, but {rows:,} row{'s' * (rows > 1)} of {length} tokens "
        f"need{'s' * (rows == 1)} {rows * body:,}; {change}"
    )
