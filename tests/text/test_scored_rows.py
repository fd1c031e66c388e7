"""Bytes of the tokens that are scored, for tokenizers on bytes, on pieces of words, and with bytes as pieces."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from models import BOS, VOCAB, build, make_tokenizer
from secateur.measure import perplexity
from secateur.model.tokens import EncodedText
from secateur.text.calibration import consecutive_rows

TEXT = "The café  sells 3 kinds of tea:\n\tgreen, black — and “white” 🍵.\nÜber 50 € spent? 你好！ 한글 text  ends here"


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=None, eos_token=None)


def on_bytes(trimmed: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer like GPT-2's, some of whose merges join bytes of different characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "e"), ("Ġ", "te"), ("Ã", "©"), ("Ġ", "s"), ("e", "n"), ("å", "¥"), ("½", "ï"), ("Ġ", "Ġ")]
    words = {word: i for i, word in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(words, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if trimmed:
        from tokenizers import processors

        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return wrapped(backend)


def on_pieces() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's: a sign for the space, and bytes for characters that it does not know."""
    known = sorted(set("▁" + "".join(letter for letter in TEXT if letter.isascii() and letter > " ")))
    merges = [("▁", "t"), ("e", "n"), ("▁t", "e")]
    words = [*(f"<0x{byte:02X}>" for byte in range(256)), *known, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return wrapped(backend)


def on_normalised_pieces() -> PreTrainedTokenizerFast:
    """A tokenizer like T5's, which changes characters and drops repeated spaces."""
    letters = sorted({letter for letter in normalizers.NFKC().normalize_str(TEXT) if letter > " "} | {"▁"})
    backend = Tokenizer(models.Unigram([(letter, -1.0) for letter in letters] + [("▁te", -0.5)], 0))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return wrapped(backend)


KINDS = {
    "bytes": on_bytes,
    "trimmed bytes": lambda: on_bytes(trimmed=True),
    "pieces": on_pieces,
    "normalised pieces": on_normalised_pieces,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_of_a_text_belongs_to_one_token(kind):
    encoded = EncodedText.of(KINDS[kind](), TEXT)
    count = len(encoded.ids)
    each = [encoded.bytes_of(place, place + 1) for place in range(count)]
    assert sum(each) == encoded.bytes_of(0, count) == len(TEXT.encode())
    assert min(each) >= 0
    for start, stop in itertools.combinations(range(0, count, 5), 2):
        assert encoded.bytes_of(start, stop) == sum(each[start:stop])


def test_tokens_have_the_bytes_that_they_spell():
    """Reference: the length of each token's spelling, between places where no character is split."""
    for tokenizer, spelled in (
        (on_bytes(), len),
        (on_bytes(trimmed=True), len),
        (on_pieces(), lambda word: 1 if word.startswith("<0x") else len(word)),
    ):
        encoded = EncodedText.of(tokenizer, TEXT)
        words = tokenizer.convert_ids_to_tokens(encoded.ids)
        # The sign for a space in front of the text stands for no byte of it, and shares the place of the first letter.
        extra = int(words[0].startswith("▁"))
        ends = list(itertools.accumulate(map(spelled, words)))
        text = TEXT.encode()
        whole = [place for place, end in enumerate(ends) if place and _ends_a_character(text, end - extra)]
        assert len(whole) > 50
        for first, last in itertools.combinations(whole[::3], 2):
            assert encoded.bytes_of(first + 1, last + 1) == ends[last] - ends[first]


def _ends_a_character(text: bytes, end: int) -> bool:
    return end == len(text) or text[end] & 0xC0 != 0x80


def test_a_tokenizer_without_places_counts_decoded_bytes():
    fast = on_bytes()

    def decode(ids: list[int]) -> str:
        return str(fast.decode(ids))

    def call(text: str, **_: Any) -> Any:
        return _Slow(input_ids=fast(text)["input_ids"])

    encoded = EncodedText.of(_Callable(call, decode), "plain text of ASCII, tested")
    exact = EncodedText.of(fast, "plain text of ASCII, tested")
    for start, stop in itertools.combinations(range(len(exact.ids)), 2):
        assert encoded.bytes_of(start, stop) == exact.bytes_of(start, stop)


class _Slow(dict[str, Any]):
    is_fast = False


class _Callable(SimpleNamespace):
    def __init__(self, call: Any, decode: Any):
        super().__init__(call=call, decode=decode)

    def __call__(self, text: str, **how: Any) -> Any:
        return self.call(text, **how)


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
