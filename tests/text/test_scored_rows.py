"""Bytes of the tokens that are scored, for tokenizers on bytes, on pieces of words, and with bytes as pieces."""

import itertools
import math
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from models import BOS, VOCAB, build, make_tokenizer
from secateur import consecutive_rows, perplexity
from secateur.checkpoints.tokens import EncodedText
from tiny_tokenizers import KINDS, tokenizer_json

TEXT = "The café  sells 3 kinds of tea:\n\tgreen, black — and “white” 🍵.\nÜber 50 € spent? 你好！ 한글 text  ends here"


@cache
def fast(kind: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer_json(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_of_a_text_belongs_to_one_token(kind):
    encoded = EncodedText.of(fast(kind), TEXT)
    count = len(encoded.ids)
    each = [encoded.bytes_of(place, place + 1) for place in range(count)]
    assert sum(each) == encoded.bytes_of(0, count) == len(TEXT.encode())
    assert min(each) >= 0
    for start, stop in itertools.combinations(range(0, count, 5), 2):
        assert encoded.bytes_of(start, stop) == sum(each[start:stop])


def pieces(word: str) -> int:
    return 1 if word.startswith("<0x") else len(word.replace("▁", " ").encode())


@pytest.mark.parametrize(
    ("kind", "spelled"), [("gpt2", len), ("llama3", len), ("qwen", len), ("gemma", pieces), ("llama2", pieces)]
)
def test_tokens_have_the_bytes_that_they_spell(kind, spelled):
    """Reference: the length of each token's spelling, between places where no character is split."""
    encoded, text = EncodedText.of(fast(kind), TEXT), TEXT.encode()
    words = fast(kind).convert_ids_to_tokens(encoded.ids)
    # The sign for a space in front of the text stands for no byte of it, and shares the place of the first letter.
    extra = int(words[0].startswith("▁"))
    ends = list(itertools.accumulate(map(spelled, words)))
    # No byte after the end of a character continues one.
    after = [*text, 0]
    whole = [place for place, end in enumerate(ends) if place and after[end - extra] & 0xC0 != 0x80]
    assert len(whole) > 40
    for first, last in itertools.combinations(whole[::3], 2):
        assert encoded.bytes_of(first + 1, last + 1) == ends[last] - ends[first]


@pytest.mark.parametrize("bos", [False, True])
def test_bytes_of_rows_are_those_of_all_tokens_but_the_first(tmp_path, bos):
    words = [f"w{i * i % 100}" for i in range(100)]
    (tmp_path / "text.txt").write_text(" ".join(words))
    rows = consecutive_rows(make_tokenizer(bos), str(tmp_path / "text.txt"), length=8, tokens=80, vocab_size=VOCAB)
    assert (rows.ids[:, 0] == BOS).all() == bos
    body = 8 - bos
    spelled = [len(word) + (place > 0) for place, word in enumerate(words)]
    assert rows.bytes == sum(sum(spelled[row * body + 1 - bos : (row + 1) * body]) for row in range(10))


def test_bits_per_byte_compare_tokenizers(tmp_path):
    """A model that predicts all tokens alike needs log2(vocabulary) bits for each token, whatever its length."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 5)
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    rows = consecutive_rows(make_tokenizer(), str(path), length=8, tokens=None, vocab_size=VOCAB)
    result = perplexity(model, rows.ids, text_bytes=rows.bytes)
    assert result.perplexity == pytest.approx(VOCAB)
    assert result.bytes == rows.bytes
    assert result.bits_per_byte == pytest.approx(math.log2(VOCAB) * result.tokens / rows.bytes)
    assert perplexity(model, rows.ids).bits_per_byte is None
