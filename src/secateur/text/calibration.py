"""Texts to rows of token ids: random windows for calibration, consecutive rows for evaluation.

Statistics and perplexities are only comparable when the rows are built alike, so everything that decides what a
row holds stands here: how documents are joined, where a window may begin, and whether BOS opens a row. Where the
text comes from is `secateur.text.documents`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.base.errors import SecateurError
from secateur.model.tokens import begins_with_bos, encode
from secateur.text.documents import MOST_CHARACTERS, Split, is_file, read_documents
from secateur.text.general import general_rows, spread
from secateur.text.sources import GENERAL, RANDOM, STDIN, beside_general
from secateur.text.windows import checked, windows

_JOIN = "\n\n"
_seen: ContextVar[dict[Any, Tensor] | None] = ContextVar("_seen", default=None)
"""Ids of sources that were tokenised already, inside `tokenised_once`."""


def check_calibration(source: str, *, samples: int = 1, length: int, max_positions: int | None = None) -> None:
    """What can be found wrong without reading a token: to be called before a large model is opened.

    Args:
        source: As for `read_documents`, or `random`; a file must exist and have a known extension.
        samples: Rows wanted, at least 1.
        length: Tokens in a row, at least 2: a row of one token predicts nothing.
        max_positions: The longest row that the model's positions allow, if there is a limit.

    Raises:
        SecateurError: One of these does not hold.
    """
    if samples < 1:
        raise SecateurError(f"samples is {samples}; it must be at least 1")
    if length < 2:
        raise SecateurError(f"length is {length}; it must be at least 2")
    if max_positions is not None and length > max_positions:
        raise SecateurError(f"length is {length}, but the model has {max_positions} positions: take a smaller length")
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
    split: Split = "calibration",
    option: str = "samples",
    taken: int = 0,
    one_in: int = 1,
) -> Tensor:
    """Draw random rows from a source, the same ones for the same seed.

    The text is cut into windows behind a random offset, and windows are drawn without repetition: no token
    is used twice. A row opens with BOS exactly if the tokenizer would add it.

    Args:
        tokenizer: The model's; may be None for `random`.
        source: As for `read_documents`; `general`, several kinds of text out of the package; `general+TEXT`, half
            of it the one and half the other; or `random`, token ids drawn evenly, special ones excepted where a
            tokenizer tells which they are.
        length: Tokens in a row, BOS included.
        vocab_size: Rows of the model's embedding; every id is below it.
        max_positions: The longest row that the model's positions allow, if there is a limit.
        option: What a person calls the number of rows, for advice.
        taken: Rows among them that this number does not count.
        one_in: Such a number of rows of the run holds one of these.

    Returns:
        Token ids, int64 [samples, length].

    Raises:
        SecateurError: A source that cannot be read or is too short, a size out of range, or ids that the
            model does not have.

    Example:
        >>> rows = calibration_rows(None, "random", samples=4, length=16, seed=0, vocab_size=128)
        >>> rows.shape, rows.dtype
        (torch.Size([4, 16]), torch.int64)
    """
    check_calibration(source, samples=samples, length=length, max_positions=max_positions)
    own = beside_general(source)
    if own is not None and samples == 1:
        source, own = GENERAL, None
    generator = torch.Generator().manual_seed(seed)
    bos = _bos(tokenizer, vocab_size)
    body = length - len(bos)
    if source == RANDOM:
        allowed = _plain_ids(tokenizer, vocab_size)
        picks = torch.randint(len(allowed), (samples, body), generator=generator)
        return _opened(bos, allowed[picks])
    if own is not None:
        how: dict[str, Any] = {"length": length, "seed": seed, "vocab_size": vocab_size, "option": option}
        how |= {"split": split, "taken": taken, "one_in": 2}
        general = calibration_rows(tokenizer, GENERAL, samples=samples - samples // 2, **how)
        return spread([general, calibration_rows(tokenizer, own, samples=samples // 2, **how)])
    if source == GENERAL:
        drawn = general_rows(
            _there(tokenizer, source), samples=samples, body=body, vocab_size=vocab_size, generator=generator
        )
        return _opened(bos, drawn)
    ids = _ids(tokenizer, source, split, MOST_CHARACTERS, vocab_size)
    spare = len(ids) - samples * body
    if spare < 0:
        raise _too_short(source, len(ids), samples, length, len(bos), option, taken, one_in)
    return _opened(bos, windows(ids, samples, body, generator))


def consecutive_rows(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    *,
    length: int,
    tokens: int | None,
    vocab_size: int,
    max_positions: int | None = None,
    split: Split = "evaluation",
) -> Tensor:
    """Cut the beginning of a source into consecutive rows, as perplexity is usually measured.

    Args:
        source: As for `read_documents`.
        length: Tokens in a row, BOS included where the tokenizer would add it.
        tokens: Tokens in all rows together; an incomplete last row is dropped. None takes the whole text.
            A shorter text gives fewer rows.
        vocab_size: Rows of the model's embedding; every id is below it.
        max_positions: The longest row that the model's positions allow, if there is a limit.

    Returns:
        Token ids, int64 [rows, length], at least one row.

    Raises:
        SecateurError: A source that cannot be read or does not fill a row, a size out of range, or ids that
            the model does not have.
    """
    check_calibration(source, length=length, max_positions=max_positions)
    if tokens is not None and tokens < length:
        raise SecateurError(f"tokens is {tokens}, which does not fill one row of length {length}: take more")
    bos = _bos(tokenizer, vocab_size)
    body = length - len(bos)
    # Sixteen characters a token are ample in every script; the floor covers a text of unusual words.
    characters = MOST_CHARACTERS if tokens is None else min(MOST_CHARACTERS, max(16 * tokens, 1_000_000))
    ids = _ids(tokenizer, source, split, characters, vocab_size)
    rows = len(ids) // body if tokens is None else min(len(ids) // body, tokens // length)
    if rows == 0:
        raise _too_short(source, len(ids), 1, length, len(bos))
    return _opened(bos, ids[: rows * body].view(rows, body))


def _bos(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> Tensor:
    """What opens every row, int64: BOS if the tokenizer puts it there, else nothing."""
    opening = [int(tokenizer.bos_token_id)] if tokenizer is not None and begins_with_bos(tokenizer) else []
    return checked(opening, vocab_size)


def _opened(bos: Tensor, rows: Tensor) -> Tensor:
    return torch.cat([bos.expand(len(rows), -1), rows], dim=1)


@contextmanager
def tokenised_once() -> Iterator[None]:
    """Inside, a source is read and tokenised once for each model that rows are made for."""
    token = _seen.set({})
    try:
        yield
    finally:
        _seen.reset(token)


def _ids(
    tokenizer: PreTrainedTokenizerBase | None, source: str, split: Split, characters: int, vocab_size: int
) -> Tensor:
    """All documents of a source as one sequence of ids, int64 [tokens]."""
    tokenizer = _there(tokenizer, source)
    seen, key = _seen.get(), (tokenizer.name_or_path, source, split, characters, vocab_size)
    if seen is not None and key in seen:
        return seen[key]
    documents = read_documents(source, tokenizer, split=split, characters=characters)
    ids = checked(encode(tokenizer, _JOIN.join(documents)), vocab_size)
    if seen is not None:
        seen[key] = ids
    return ids


def _there(tokenizer: PreTrainedTokenizerBase | None, source: str) -> PreTrainedTokenizerBase:
    """The tokenizer, which a text needs."""
    if tokenizer is None:
        raise SecateurError(f"{source} needs a tokenizer, and the model has none: take the source {RANDOM}")
    return tokenizer


def _plain_ids(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> Tensor:
    """The ids that stand for text, int64; rows that only pad the embedding are untrained and stay out."""
    if tokenizer is None:
        return torch.arange(vocab_size)
    special = set(tokenizer.all_special_ids)
    special |= {index for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    plain = [index for index in range(min(vocab_size, len(tokenizer))) if index not in special]
    if not plain:
        raise SecateurError("every id of the tokenizer is a special one, so no random ids can be drawn: use a text")
    return torch.tensor(plain, dtype=torch.int64)


def _too_short(
    source: str,
    found: int,
    samples: int,
    length: int,
    bos: int,
    option: str = "samples",
    taken: int = 0,
    one_in: int = 1,
) -> SecateurError:
    """What is missing, and what the text at hand would give."""
    name = "standard input" if source == STDIN else source
    body = length - bos
    fits = []
    if samples > 1 and (most := one_in * (found // body) - taken) > 0:
        fits.append(f"{option} {most}")
    if found // samples + bos >= 2:
        fits.append(f"length {found // samples + bos}")
    advice = f"take {' or '.join(fits)}, or a longer text" if fits else "take a longer text"
    return SecateurError(
        f"{name}: text too short for the samples, it has {found:,} tokens, but {samples} x {length} need "
        f"{samples * body:,}; {advice}"
    )
