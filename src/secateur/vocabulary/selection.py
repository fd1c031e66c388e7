"""Which tokens of a vocabulary are kept.

Always kept are special and added tokens, tokens that a config names, single bytes, and tokens that are one character of
the kept scripts. A kept token that BPE makes from others brings these along, and the tokens that they are made from.

**Scripts are exact.** A token is kept if some text of the scripts, as normalised, contains its bytes or characters.
Let BPE split such a text. Every token that it makes on the way is a part of the text, so it is kept. Then every merge
that it makes is kept, and the cut tokenizer makes the same merges (see `models.py`). For Unigram, every token that
could be in a split is kept, so all possible splits and their scores are unchanged. The steps before the model are not
changed: added tokens, normaliser and pre-tokenizer. Conversely, a token that no such text contains is never used.

**Padding.** The number of kept tokens is rounded up by keeping further tokens of the vocabulary. Rows without a token
would be worse: the model never learned to avoid them, so they could win.
"""

from collections.abc import Mapping
from itertools import islice

from secateur.base.errors import SecateurError
from secateur.vocabulary.kept import KeptTokens
from secateur.vocabulary.scripts import characters_of, parse_scripts, with_normalised
from secateur.vocabulary.tokenizer import StoredTokenizer
from secateur.vocabulary.wanted import Wanted


def select(
    tokenizer: StoredTokenizer,
    rows: int,
    wanted: Wanted,
    counts: Mapping[int, int],
    must_keep: frozenset[int] = frozenset(),
    *,
    multiple: int = 64,
) -> KeptTokens:
    """Return the tokens to keep.

    Args:
        tokenizer: The tokenizer of the model.
        rows: Number of rows of the embedding.
        wanted: Which tokens to keep. Where that depends on a text, all of its main scripts' single characters are kept.
            A number of tokens is filled with those of the main scripts first, the most frequent ones of these first.
        counts: Occurrences of each token in the text; tokens that are missing do not occur.
        must_keep: Ids that config.json and other files name.
        multiple: The number of kept tokens is rounded up to a multiple of this number.

    Raises:
        SecateurError: There is no such script, the tokens that must be kept are more than the number, a config names an
            id that no token has, or the tokenizer has tokens that the model lacks.
    """
    _check(tokenizer, rows, must_keep)
    model, characters = tokenizer.model, _characters(tokenizer, wanted, counts)
    tokens = {token for token in (*model.spellings, *tokenizer.added.values()) if token < rows}
    occurring = tokenizer.occurring(characters)
    required = {token for token in _required(tokenizer, characters) | must_keep if token < rows}
    if wanted.least:
        required |= {token for token, count in counts.items() if count >= wanted.least} & tokens
    kept = set(occurring) if wanted.scripts else set()
    kept.update(model.parts_first(required, kept))
    asked = wanted.number or round(wanted.share * rows)
    number = -(-(asked or len(kept)) // multiple) * multiple
    if len(kept) > number:
        raise SecateurError(
            f"{asked:,} tokens are too few: special tokens, bytes and single characters alone are {len(kept):,}"
        )
    first = occurring if asked else set()
    others = sorted(tokens - kept, key=lambda token: (token not in first, -counts.get(token, 0), token))
    kept.update(islice(model.parts_first(others, kept), number - len(kept)))
    return tokenizer.keeping(sorted(kept) if len(kept) == number else range(rows), rows)


def _required(tokenizer: StoredTokenizer, characters: frozenset[str]) -> set[int]:
    """Return the ids of the tokens that are always kept, among them those that are one of some characters."""
    single = {token for token in tokenizer.model.spellings if tokenizer.text_of(token) in characters}
    return single | tokenizer.bytes_alone() | tokenizer.named() | tokenizer.model.fixed()


def _characters(tokenizer: StoredTokenizer, wanted: Wanted, counts: Mapping[int, int]) -> frozenset[str]:
    """Return the characters of texts of the kept scripts, or of a text's main scripts, after normalisation."""
    if wanted.scripts:
        codes = parse_scripts(wanted.scripts, tokenizer.scripts(dict.fromkeys(tokenizer.model.spellings, 1), share=0))
    else:
        codes = tokenizer.scripts(counts)
    return with_normalised(characters_of(codes), tokenizer.normaliser)


def _check(tokenizer: StoredTokenizer, rows: int, must_keep: frozenset[int]) -> None:
    """Check that the tokenizer is the model's, and that each id which must be kept is a token's or a later row's."""
    # Added tokens may lie beyond the rows: they are for inputs of other kinds, or for training.
    if (largest := max(tokenizer.model.spellings)) >= rows:
        raise SecateurError(
            f"{tokenizer.folder}: the tokenizer has a token with the id {largest:,}, but the model has {rows:,} "
            "tokens; use the tokenizer of this model"
        )
    no_tokens = must_keep - tokenizer.model.spellings.keys() - {*tokenizer.added.values()}
    if wrong := sorted(token for token in no_tokens if token < tokenizer.size):
        raise SecateurError(
            f"{tokenizer.folder}: a config names the token id {wrong[0]}, which is no token; correct it"
        )
