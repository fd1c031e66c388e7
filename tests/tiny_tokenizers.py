"""Tiny tokenizers of every kind whose vocabulary can be cut, trained on sentences in eight scripts."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCES = {
    "latin": [
        "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
        "Où est le café d'à côté ? L'été dernier, Zoë y a mangé des crêpes…",
        "for (int i = 0; i < 10; ++i) { total += values[i] * 2; }  // the total",
        "“There is no such thing,” said the fox — “as a free lunch in 1984!” 🙂🎉",
        "Tiếng Việt có dấu; Größe, Straße, naïve, señor, ångström, İstanbul.",
    ],
    "cyrillic": [
        "Съешь же ещё этих мягких французских булок, да выпей чаю.",
        "Это было в 1984 году; он не знал, что это было.",
    ],
    "greek": ["Η γρήγορη καφέ αλεπού πηδάει πάνω από το τεμπέλικο σκυλί.", "Το σκυλί κοιμάται και η αλεπού πηδάει."],
    "han": ["我能吞下玻璃而不伤身体。我不知道这是什么。", "他说这是中国的第一个问题,我们不知道。"],
    "hiragana": ["いろはにほへとちりぬるをわかよたれそつねならむ。これはなんですか。"],
    "arabic": ["أنا قادر على أكل الزجاج و هذا لا يؤلمني.", "هذا هو الكتاب الذي على الطاولة."],
    "devanagari": ["मैं काँच खा सकता हूँ और मुझे उससे कोई चोट नहीं पहुंचती।"],
    "hangul": ["나는 유리를 먹을 수 있어요. 그래도 아프지 않아요."],
}
"""Sentences by script."""

_CORPUS = [sentence for sentences in SENTENCES.values() for sentence in sentences] * 4
_WORDS = Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+")
_BYTES = [f"<0x{number:02X}>" for number in range(256)]
_CONTROL = ["<unk>", "<s>", "</s>", "<pad>"]
_SPLIT = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(_WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
)


def _byte_level(split: Any = _SPLIT, normalizer: Any = None, **model: Any) -> Tokenizer:
    """Return a trained tokenizer with byte-level BPE."""
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.decoder, tokenizer.pre_tokenizer = decoders.ByteLevel(), split
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def gpt2() -> Tokenizer:
    """Byte-level BPE with one special token, which is the last token of the model, as GPT-2's."""
    tokenizer = _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    end = ("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))
    tokenizer.post_processor = processors.RobertaProcessing(end, end)
    return tokenizer


def llama3() -> Tokenizer:
    """Byte-level BPE that turns a known word into its token without merges, as Llama 3's."""
    tokenizer = _byte_level(ignore_merges=True)
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>", "<|reserved|>"])
    begin = ("<|begin|>", tokenizer.token_to_id("<|begin|>"))
    template = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A <|begin|> $B:1", special_tokens=[begin]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def qwen() -> Tokenizer:
    """Byte-level BPE of composed characters (NFC), as Qwen's, with a padding token."""
    tokenizer = _byte_level(normalizer=normalizers.NFC())
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("<|endoftext|>"), pad_token="<|endoftext|>")
    return tokenizer


def _sentencepiece(normalizer: normalizers.Normalizer, fallback: bool) -> Tokenizer:
    """Return BPE over characters with all merges that lead to each token, as made from a SentencePiece model."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    own = _CONTROL + _BYTES * fallback
    trainer = trainers.BpeTrainer(vocab_size=1100, limit_alphabet=220, special_tokens=own, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    contents = json.loads(tokenizer.to_str())
    vocab: dict[str, int] = contents["model"]["vocab"]
    # Longer tokens that two merges make, such as "aaaa" from "a" and "aaa", so that a token has several merges.
    contents["model"]["merges"] = [
        [token[:place], token[place:]]
        for token in sorted(vocab, key=vocab.__getitem__)
        for place in range(1, len(token))
        if token[:place] in vocab and token[place:] in vocab and not token.startswith("<")
    ]
    contents["model"]["byte_fallback"] = fallback
    # Bytes are tokens of the model, but not special ones.
    contents["added_tokens"] = [token for token in contents["added_tokens"] if token["content"] in _CONTROL]
    contents["pre_tokenizer"] = None
    return Tokenizer.from_str(json.dumps(contents))


def _with_bos(tokenizer: Tokenizer) -> Tokenizer:
    """Make a tokenizer put `<s>` first."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def gemma() -> Tokenizer:
    """BPE over characters with bytes for unknown ones, as Gemma's."""
    tokenizer = _sentencepiece(normalizers.Replace(" ", "▁"), fallback=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<start_of_turn>", "<image>"])
    return _with_bos(tokenizer)


def llama2() -> Tokenizer:
    """BPE over characters that begins every text with a space, as Llama 2's."""
    tokenizer = _sentencepiece(
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), fallback=True
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_bos(tokenizer)


def characters() -> Tokenizer:
    """BPE over characters with an unknown token, and no bytes."""
    tokenizer = _sentencepiece(normalizers.Replace(" ", "▁"), fallback=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return tokenizer


def unigram() -> Tokenizer:
    """Unigram with an unknown token, whose normaliser replaces characters by compatible ones, as T5's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    how: dict[str, Any] = {"special_tokens": _CONTROL, "unk_token": "<unk>", "show_progress": False}
    tokenizer.train_from_iterator(_CORPUS, trainers.UnigramTrainer(vocab_size=900, **how))
    end = ("</s>", tokenizer.token_to_id("</s>"))
    tokenizer.post_processor = processors.BertProcessing(end, end)
    return tokenizer


def unigram_bytes() -> Tokenizer:
    """Unigram with bytes for unknown characters."""
    contents = json.loads(unigram().to_str())
    contents["model"]["vocab"] += [[name, -20.0] for name in _BYTES]
    contents["model"]["byte_fallback"] = True
    whole = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
    contents["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, whole]}
    return Tokenizer.from_str(json.dumps(contents))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    make.__name__: make for make in (gpt2, llama3, qwen, gemma, llama2, characters, unigram, unigram_bytes)
}


@cache
def tokenizer_json(kind: str) -> str:
    """Return the tokenizer.json of a kind."""
    return KINDS[kind]().to_str()


def save_tokenizer(kind: str, folder: Path) -> Path:
    """Write the tokenizer.json of a kind into a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(kind), encoding="utf-8")
    return folder
