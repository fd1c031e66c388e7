"""A transformers tokenizer as metadata of a GGUF file.

GGUF stores a vocabulary in one of llama.cpp's own forms. For byte-level BPE, it stores only the *name* of the
pre-tokenizer, the rule by which text is split before merging. Secateur looks up the name by the rule in tokenizer.json,
so that a fine-tuned or rebuilt tokenizer gets the same name as the original. A tokenizer with an unknown rule is
refused, because llama.cpp would silently split text at other places.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType

from secateur.base.errors import SecateurError
from secateur.model.tokens import begins_with_bos, encode

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_SLASH = _REST.replace(r"\r\n]*", r"\r\n/]*")
_REST_MARKED = _REST.replace(r"\p{L}", r"\p{L}\p{M}")
_WORD_MARKED = r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST_ONE = r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
_PHRASE = r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|"
_LOWER_END = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER_START = r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"

_DIGITS, _NUMBERS, _PUNCTUATION, _WORDS = "single digits", "numbers", "punctuation", "GPT-2 words"

_GPT_4O = f"{_LOWER_END}{_CONTRACTION}?{_UPPER_START}{_CONTRACTION}?" + r"|\p{N}{1,3}" + _REST_SLASH
_BY_THREES = _CONTRACTION + _WORD + r"\p{N}{1,3}" + _REST

PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_WORDS,), False): "gpt-2",
    ((_DIGITS, _WORDS), False): "smollm",
    ((_BY_THREES,), True): "llama-bpe",
    ((_BY_THREES,), False): "dbrx",
    ((_CONTRACTION + _WORD + r"\p{N}" + _REST,), False): "qwen2",
    ((_CONTRACTION + _WORD_MARKED + r"\p{N}" + _REST_MARKED,), False): "qwen35",
    ((_LOWER_END + _UPPER_START + r"|\p{N}" + _REST_SLASH,), True): "tekken",
    ((_GPT_4O,), False): "gpt-4o",
    ((_PUNCTUATION, _WORDS, _NUMBERS, "[0-9][0-9][0-9]"), False): "falcon",
    ((r" ?[^(\s|[.,!?…。，、।۔،])]+",), False): "bloom",
    ((_CONTRACTION + _PHRASE + r"\p{N}" + _REST_ONE,), False): "exaone-moe",
}
"""llama.cpp's names of pre-tokenizers, by their splits in order, and by whether a word that is in the vocabulary
becomes one token without merging its characters (`ignore_merges`)."""

_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"
"""Sign for a space in SentencePiece vocabularies."""

_RESERVED_NAMES = ("phi-3", "phi3", "jina-v2", "modern-bert", "mistral")
"""Parts of general.name by which llama.cpp or transformers would treat the file as another model."""
_STRIPPING_NAME = "phi-3"
"""Part of general.name by which llama.cpp drops spaces after special tokens, except after `_NOT_STRIPPING`."""
_NOT_STRIPPING = frozenset({"<unk>", "<s>", "<|endoftext|>"})
"""Tokens that must be in the vocabulary if such a name is used, together with `</s>`."""

_UNMERGED = -1e9
"""Score of a token that is not the result of a merge."""


@dataclass(frozen=True)
class Vocabulary:
    """Vocabulary and settings of a tokenizer, in the form that GGUF has for them."""

    model: str
    """llama.cpp's name of the algorithm: `gpt2` for byte-level BPE, `llama` for SentencePiece BPE."""
    pre: str
    """llama.cpp's name of the pre-tokenizer."""
    tokens: list[str]
    """Text of each token, by id."""
    types: list[int]
    """llama.cpp's type of each token, by id."""
    merges: list[str] | None
    """Merges of byte-level BPE, in the order in which they are tried."""
    scores: list[float] | None
    """Scores of SentencePiece tokens, by id; tokens with higher scores are merged earlier."""
    space_prefix: bool
    """Whether a space is put before a text."""
    special: dict[str, int]
    """Ids of special tokens, by name: `bos`, `eos`, ..."""
    bos: bool
    """Whether BOS is put before a text."""
    eos: bool
    """Whether EOS is put after a text."""
    chat_template: Any
    strips: bool
    """Whether spaces after special tokens are dropped, as in Phi-3."""

    def safe_name(self, name: str) -> str:
        """Return the model's name for the file, or another name if readers would confuse it with another model."""
        if self.strips:
            return _STRIPPING_NAME
        return "pruned" if any(part in name.lower() for part in _RESERVED_NAMES) else name


def vocabulary_of(tokenizer: Any, size: int) -> Vocabulary:
    """Return the vocabulary of a tokenizer.

    Args:
        tokenizer: A tokenizer of transformers.
        size: Number of rows of the embedding, which llama.cpp assumes to be the number of tokens.

    Raises:
        SecateurError: GGUF cannot hold the tokenizer, or its pre-tokenizer has no name here.
    """
    stored = _stored(tokenizer)
    byte_level = _is_byte_level(stored)
    tokens, types = _tokens(stored, size, byte_level)
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in _SPECIAL}
    plain, full = encode(tokenizer, "a"), encode(tokenizer, "a", special=True)
    return Vocabulary(
        **(_byte_level_fields(stored) if byte_level else _sentencepiece_fields(stored, tokens)),
        tokens=tokens,
        types=types,
        special={name: index for name, index in special.items() if index is not None and index < size},
        bos=begins_with_bos(tokenizer),
        eos=len(full) > len(plain) and full[-1] == special["eos"],
        chat_template=tokenizer.chat_template,
        strips=_strips(stored, size),
    )


def _stored(tokenizer: Any) -> dict[str, Any]:
    """Return the contents of tokenizer.json.

    Raises:
        SecateurError: The tokenizer has no tokenizer.json, or GGUF does not support its algorithm.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise SecateurError(
            f"{type(tokenizer).__name__} has no tokenizer.json, from which GGUF output is made; "
            "save a fast tokenizer into the folder"
        )
    stored: dict[str, Any] = json.loads(backend.to_str())
    model, known = stored["model"], "GGUF output supports only byte-level BPE and SentencePiece BPE"
    if model["type"] != "BPE":
        raise SecateurError(f"the tokenizer is {model['type']}; {known}, so keep the safetensors folder")
    if not _is_byte_level(stored) and not model.get("byte_fallback"):
        raise SecateurError(
            f"the tokenizer is BPE over characters without a fallback to bytes; {known}, so keep the safetensors folder"
        )
    if _is_byte_level(stored) and not model["merges"]:
        raise SecateurError(
            "the tokenizer has no merges, and llama.cpp cannot open a file without them; keep the safetensors folder"
        )
    return stored


def _is_byte_level(stored: dict[str, Any]) -> bool:
    """Return whether a BPE tokenizer works on bytes, rather than on characters as SentencePiece does."""
    return any(step["type"] == "ByteLevel" for step in _steps(stored.get("pre_tokenizer")))


def _byte_level_fields(stored: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a `Vocabulary` that depend on the algorithm, for byte-level BPE."""
    return {
        "model": "gpt2",
        "pre": _pre_tokenizer(stored),
        "merges": [" ".join(pair) for pair in _pairs(stored)],
        "scores": None,
        "space_prefix": False,
    }


def _sentencepiece_fields(stored: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Return the fields of a `Vocabulary` that depend on the algorithm, for SentencePiece BPE."""
    return {
        "model": "llama",
        "pre": "default",
        "merges": None,
        "scores": _scores(tokens, _pairs(stored)),
        "space_prefix": _has_space_prefix(stored),
    }


def _pairs(stored: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the pairs of tokens that are merged, in the order in which they are tried."""
    merges = stored["model"]["merges"]
    return [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in merges]


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Add a vocabulary to the metadata of a file."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    # The writer leaves out empty lists.
    writer.add_token_merges(vocabulary.merges or [])
    writer.add_token_scores(vocabulary.scores or [])
    writer.add_add_space_prefix(vocabulary.space_prefix)
    for name, index in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(vocabulary.bos)
    writer.add_add_eos_token(vocabulary.eos)
    template = vocabulary.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield normalizers or pre-tokenizers in order, with sequences unrolled."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
    for inner in part.get("pretokenizers") or part.get("normalizers") or ():
        yield from _steps(inner)


def _pre_tokenizer(stored: dict[str, Any]) -> str:
    """Return llama.cpp's name of the pre-tokenizer.

    Raises:
        SecateurError: secateur knows no name for its rule.
    """
    splits = tuple(filter(None, map(_split, _steps(stored.get("pre_tokenizer")))))
    name = PRE_TOKENIZERS.get((splits, bool(stored["model"].get("ignore_merges"))))
    if name is None:
        known = ", ".join(sorted(PRE_TOKENIZERS.values()))
        raise SecateurError(
            f"secateur does not know what llama.cpp calls the rule by which this tokenizer splits text (known: "
            f"{known}); add the rule to secateur/formats/gguf_tokenizer.py, or keep the safetensors folder"
        )
    return name


def _split(step: dict[str, Any]) -> str:
    """Return one step of a pre-tokenizer in the spelling of `PRE_TOKENIZERS`; empty if the step does not split."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return _WORDS if use_regex else ""
        case {"type": "Digits", "individual_digits": single}:
            return _DIGITS if single else _NUMBERS
        case {"type": "Punctuation", "behavior": "Contiguous"}:
            return _PUNCTUATION
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}:
            # If a regex matches all text, isolating its matches and removing everything else are the same.
            if (behavior, invert) in (("Isolated", False), ("Removed", True)):
                return str(regex).replace("\r", r"\r").replace("\n", r"\n")
    return f"unknown {step['type']}"


def _tokens(stored: dict[str, Any], size: int, byte_level: bool) -> tuple[list[str], list[int]]:
    """Return the text and the type of each token, by id. Unused ids get a text that does not occur otherwise."""
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [int(TokenType.UNUSED)] * size
    vocabulary = {text: index for text, index in stored["model"]["vocab"].items() if index < size}
    for text, index in vocabulary.items():
        is_byte = not byte_level and _BYTE.fullmatch(text)
        tokens[index], types[index] = text, int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for added in (token for token in stored["added_tokens"] if token["id"] < size):
        index, text, special = added["id"], added["content"], added["special"]
        # llama.cpp searches for these tokens before it replaces spaces by the sign for spaces.
        tokens[index] = text if byte_level or special else text.replace(_SPACE, " ")
        types[index] = int(TokenType.CONTROL if special else TokenType.USER_DEFINED)
    unknown = stored["model"].get("unk_token")
    if not byte_level and unknown in tokens:
        types[tokens.index(unknown)] = int(TokenType.UNKNOWN)
    return tokens, types


def _strips(stored: dict[str, Any], size: int) -> bool:
    """Return whether added tokens remove the spaces after them, as llama.cpp does for Phi-3.

    Raises:
        SecateurError: Other tokens than Phi-3's remove spaces, or tokens depend on the text around them; GGUF files
            cannot state either.
    """
    added = {token["content"]: token for token in stored["added_tokens"] if token["id"] < size}
    stripping = {text for text, token in added.items() if token.get("rstrip")}
    depending = [text for text, token in added.items() if token.get("lstrip") or token.get("single_word")]
    as_phi3 = _NOT_STRIPPING | {"</s>"} <= added.keys() and stripping == added.keys() - _NOT_STRIPPING
    refused = depending + ([] if as_phi3 else sorted(stripping))
    if refused:
        raise SecateurError(
            f"the tokenizer's {refused[0]} removes spaces around it or depends on the words around it, which llama.cpp "
            "does not support; keep the safetensors folder"
        )
    return bool(stripping)


def _scores(tokens: list[str], pairs: list[tuple[str, ...]]) -> list[float]:
    """Return scores with which SentencePiece, which merges into the token with the highest score first, follows the
    order of the merges."""
    rank: dict[str, int] = {}
    for position, pair in enumerate(pairs):
        rank.setdefault("".join(pair), position)
    return [-float(rank[token]) if token in rank else _UNMERGED for token in tokens]


def _has_space_prefix(stored: dict[str, Any]) -> bool:
    """Return whether a SentencePiece tokenizer puts a space before a text."""
    normalizers, pre_tokenizers = (_steps(stored.get(part)) for part in ("normalizer", "pre_tokenizer"))
    prepends = (step["type"] == "Prepend" and step["prepend"] == _SPACE for step in normalizers)
    schemes = (step.get("prepend_scheme", "always") for step in pre_tokenizers if step["type"] == "Metaspace")
    return any(prepends) or any(scheme != "never" for scheme in schemes)
