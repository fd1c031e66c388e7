"""A cut tokenizer splits texts of the kept scripts into the same tokens, and can still read any other text."""

import json
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from secateur.vocabulary.kept import KeptTokens
from secateur.vocabulary.scripts import characters_of, parse_scripts
from secateur.vocabulary.selection import select
from secateur.vocabulary.side_files import cut_contents
from secateur.vocabulary.tokenizer import StoredTokenizer, read_tokenizer
from secateur.vocabulary.wanted import Wanted
from tiny_tokenizers import KINDS, SENTENCES, save_tokenizer

LOSSY = ("characters", "unigram")
"""Kinds that turn characters without a token into the unknown token."""
CHOICES = ("latin", "cyrillic+latin", "greek", "hiragana+han+katakana")
EVERY = [(kind, scripts) for kind in KINDS for scripts in CHOICES]


@cache
def stored(kind: str) -> StoredTokenizer:
    return read_tokenizer(save_tokenizer(kind, Path(mkdtemp()) / kind))


@cache
def full(kind: str) -> Tokenizer:
    return Tokenizer.from_file(str(stored(kind).folder / "tokenizer.json"))


def cut(kind: str, kept: KeptTokens) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(cut_contents(stored(kind), kept)))


def selected(kind: str, wanted: Wanted, counts: Counter[int], multiple: int) -> KeptTokens:
    return select(stored(kind), stored(kind).size, wanted, counts, multiple=multiple)


@cache
def by_scripts(kind: str, scripts: str) -> tuple[KeptTokens, Tokenizer]:
    kept = selected(kind, Wanted(scripts=scripts), Counter(), 8)
    assert len(kept.ids) < stored(kind).size
    return kept, cut(kind, kept)


def check_same(kind: str, kept: KeptTokens, small: Tokenizer, text: str) -> None:
    old = full(kind).encode(text).ids
    assert set(old) <= set(kept.ids), text
    assert small.encode(text).ids == [kept.new_ids[token] for token in old], text


def check_readable(kind: str, small: Tokenizer, text: str) -> None:
    ids = small.encode(text).ids
    assert max(ids, default=0) < small.get_vocab_size()
    if kind not in LOSSY:
        assert small.decode(ids) == full(kind).decode(full(kind).encode(text).ids)


@cache
def texts_of(scripts: str) -> st.SearchStrategy[str]:
    """Return a strategy for texts of sentences, words and characters of some scripts."""
    allowed = characters_of(parse_scripts(scripts))
    sentences = [text for texts in SENTENCES.values() for text in texts]
    words = sorted({word for text in sentences for word in (text, *text.split()) if allowed.issuperset(word)})
    common = [" ", "  ", "\n", "1", "\u0301", "\u0307"]
    parts = [st.sampled_from(words), st.sampled_from("".join(sorted(allowed))), st.sampled_from(common)]
    return st.lists(st.one_of(parts), max_size=12).map("".join)


@pytest.mark.parametrize(("kind", "scripts"), EVERY)
@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_text_of_kept_scripts_has_the_same_tokens(kind, scripts, data):
    check_same(kind, *by_scripts(kind, scripts), data.draw(texts_of(scripts)))


@pytest.mark.parametrize(("kind", "scripts"), EVERY)
@given(text=st.one_of(st.text(max_size=12), st.sampled_from([text for texts in SENTENCES.values() for text in texts])))
@settings(max_examples=25, deadline=None)
def test_other_texts_can_be_read(kind, scripts, text):
    check_readable(kind, by_scripts(kind, scripts)[1], text)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_not_split(kind):
    kept, small = by_scripts(kind, "han")
    for name, token in stored(kind).added.items():
        text = f"1{name} 2"
        check_same(kind, kept, small, text)
        assert kept.new_ids[token] in small.encode(text).ids


def counts_of(kind: str, name: str) -> Counter[int]:
    return Counter(token for text in SENTENCES[name] for token in full(kind).encode(text).ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["latin", "han"])
def test_the_counted_text_has_the_same_tokens(kind, name):
    counts = counts_of(kind, name)
    kept = selected(kind, Wanted(least=1), counts, 1)
    small = cut(kind, kept)
    for text in SENTENCES[name]:
        check_same(kind, kept, small, text)
    for text in SENTENCES["cyrillic"]:
        check_readable(kind, small, text)
    sizes = [len(selected(kind, Wanted(least=least), counts, 1).ids) for least in (1, 2, 4)]
    assert stored(kind).size > sizes[0] == len(kept.ids)
    assert name == "han" or sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_of_tokens_is_kept_exactly(kind):
    counts = counts_of(kind, "latin")
    exact = set(selected(kind, Wanted(scripts="latin"), counts, 1).ids)
    for size in range(stored(kind).size // 16 * 16 - 16, 600, -80):
        kept = selected(kind, Wanted(number=size - 3), counts, 16)
        assert len(kept.ids) == size
        small = cut(kind, kept)
        check_readable(kind, small, "".join(SENTENCES["latin"] + SENTENCES["han"]))
        if size < len(exact):
            assert set(kept.ids) <= exact
        else:
            assert set(kept.ids) >= exact
            check_same(kind, kept, small, SENTENCES["latin"][0])
