"""A transformers tokenizer as GGUF metadata.

GGUF stores a vocabulary in one of llama.cpp's own forms and, for byte-level BPE, only the *name* of the way in
which text is split before merging. The name is looked up by the split itself, as the tokenizer spells it, so that
a fine-tuned or rebuilt tokenizer gets the same name as the original; an unknown split is refused, since llama.cpp
would cut text elsewhere without a word.
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
"""Splits in order, and whether a word that is in the vocabulary is taken whole → llama.cpp's name for it."""

_TOKENS = ("bos", "eos", "unk", "sep", "pad", "mask")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_BLANK = "▁"

_NAMES = ("phi-3", "phi3", "jina-v2", "modern-bert", "mistral")
"""What general.name must not contain: llama.cpp, or transformers, takes such files for models of that name."""
_STRIPPING = "phi-3"
"""The name by which llama.cpp drops blanks behind special tokens ..."""
_NOT_STRIPPING = frozenset({"<unk>", "<s>", "<|endoftext|>"})
"""... but behind these; they and `</s>` must be there."""

_NEVER = -1e9
"""Score of a piece that no merge makes."""


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF holds of a tokenizer."""

    model: str
    """llama.cpp's kind: `gpt2` for byte-level BPE, `llama` for SentencePiece BPE."""
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None
    """Of byte-level BPE, best first."""
    scores: list[float] | None
    """Of SentencePiece BPE, higher is merged earlier."""
    space_prefix: bool
    """Whether a text gets a space in front."""
    special: dict[str, int]
    """`bos`, `eos`, ... → id."""
    bos: bool
    eos: bool
    """Whether a text is put between them."""
    chat_template: Any
    strips: bool
    """Whether blanks behind special tokens are dropped, as Phi-3 has it."""

    def named(self, name: str) -> str:
        """The name for a file with these words: as wished, where readers take nothing from it."""
        if self.strips:
            return _STRIPPING
        return "pruned" if any(part in name.lower() for part in _NAMES) else name


def vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """Read a tokenizer of transformers; size is the rows of the embedding, which llama.cpp takes for that of the words.

    Raises:
        SecateurError: GGUF has no form for it, or none is known here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise SecateurError(
            f"{type(tokenizer).__name__} has no tokenizer.json form, which GGUF output reads; "
            "save a fast tokenizer into the folder"
        )
    stored: dict[str, Any] = json.loads(backend.to_str())
    model = stored["model"]
    if model["type"] != "BPE":
        raise SecateurError(
            f"the tokenizer is {model['type']}; GGUF output holds byte-level BPE and SentencePiece BPE, "
            "so keep the safetensors folder"
        )
    steps = tuple(_steps(stored.get("pre_tokenizer")))
    byte_level = any(step["type"] == "ByteLevel" for step in steps)
    if not byte_level and not model.get("byte_fallback"):
        raise SecateurError(
            "the tokenizer is BPE over characters, without bytes to fall back on; GGUF output holds byte-level BPE "
            "and SentencePiece BPE, so keep the safetensors folder"
        )
    tokens, types = _tokens(stored, size, byte_level)
    if byte_level and not model["merges"]:
        raise SecateurError(
            "the tokenizer has no merges, without which llama.cpp opens no file; keep the safetensors folder"
        )
    pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in _TOKENS}
    plain, full = encode(tokenizer, "a"), encode(tokenizer, "a", special=True)
    return Vocabulary(
        model="gpt2" if byte_level else "llama",
        pre=_pre(steps, bool(model.get("ignore_merges"))) if byte_level else "default",
        tokens=tokens,
        types=types,
        merges=[" ".join(pair) for pair in pairs] if byte_level else None,
        scores=None if byte_level else _scores(tokens, pairs),
        space_prefix=not byte_level and _prefixes(stored.get("normalizer"), steps),
        special={name: i for name, i in special.items() if i is not None and i < size},
        bos=begins_with_bos(tokenizer),
        eos=len(full) > len(plain) and full[-1] == special["eos"],
        chat_template=tokenizer.chat_template,
        strips=_strips(stored, size),
    )


def add_vocabulary(writer: GGUFWriter, words: Vocabulary) -> None:
    """Put a vocabulary into a file's metadata."""
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.merges is not None:
        writer.add_token_merges(words.merges)
    if words.scores is not None:
        writer.add_token_scores(words.scores)
    writer.add_add_space_prefix(words.space_prefix)
    for name, index in words.special.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(words.bos)
    writer.add_add_eos_token(words.eos)
    template = words.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Normalizers or pre-tokenizers in order, sequences unrolled."""
    if part is not None and part["type"] == "Sequence":
        for inner in part.get("pretokenizers") or part.get("normalizers") or ():
            yield from _steps(inner)
    elif part is not None:
        yield part


def _pre(steps: tuple[dict[str, Any], ...], whole_words: bool) -> str:
    """llama.cpp's name of a split."""
    name = PRE_TOKENIZERS.get((tuple(filter(None, map(_split, steps))), whole_words))
    if name is None:
        known = ", ".join(sorted(PRE_TOKENIZERS.values()))
        raise SecateurError(
            f"the tokenizer splits text in a way that is none of those known here ({known}), and llama.cpp goes by "
            "the name; add its split to secateur/formats/gguf_tokenizer.py, or keep the safetensors folder"
        )
    return name


def _split(step: dict[str, Any]) -> str:
    """One step as `PRE_TOKENIZERS` spells it; empty where it splits nothing."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return _WORDS if use_regex else ""
        case {"type": "Digits", "individual_digits": single}:
            return _DIGITS if single else _NUMBERS
        case {"type": "Punctuation", "behavior": "Contiguous"}:
            return _PUNCTUATION
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}:
            # Keeping every match and dropping what is between is the same where a regex matches everything.
            if (behavior, invert) in (("Isolated", False), ("Removed", True)):
                return str(regex).replace("\r", r"\r").replace("\n", r"\n")
    return f"unknown {step['type']}"


def _tokens(stored: dict[str, Any], size: int, byte_level: bool) -> tuple[list[str], list[int]]:
    """Texts and types by id; ids that the tokenizer does not use get a name that no text contains."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for text, index in stored["model"]["vocab"].items():
        if index < size:
            tokens[index] = text
            byte = not byte_level and _BYTE.fullmatch(text)
            types[index] = int(TokenType.BYTE if byte else TokenType.NORMAL)
    unknown = stored["model"].get("unk_token")
    for added in stored["added_tokens"]:
        index, text = added["id"], added["content"]
        if index < size:
            # llama.cpp looks for these in the text before blanks become a sign.
            tokens[index] = text if byte_level or added["special"] else text.replace(_BLANK, " ")
            types[index] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    if not byte_level and unknown in tokens:
        types[tokens.index(unknown)] = int(TokenType.UNKNOWN)
    return tokens, types


def _strips(stored: dict[str, Any], size: int) -> bool:
    """Whether added tokens swallow the blanks behind them, all that llama.cpp has swallow them in Phi-3.

    Raises `SecateurError` where some do otherwise, or look at what is around them, for which GGUF has no place.
    """
    added = {token["content"]: token for token in stored["added_tokens"] if token["id"] < size}
    strips = {text for text, token in added.items() if token.get("rstrip")}
    around = [text for text, token in added.items() if token.get("lstrip") or token.get("single_word")]
    as_phi3 = _NOT_STRIPPING | {"</s>"} <= added.keys() and strips == added.keys() - _NOT_STRIPPING
    if around or (strips and not as_phi3):
        name = (around or sorted(strips))[0]
        raise SecateurError(
            f"the tokenizer's {name} takes blanks or words around it along, which llama.cpp would not; "
            "keep the safetensors folder"
        )
    return bool(strips)


def _scores(tokens: list[str], pairs: list[tuple[str, ...]]) -> list[float]:
    """Scores that make SentencePiece's rule, the best piece first, follow the order of the merges."""
    rank: dict[str, int] = {}
    for position, pair in enumerate(pairs):
        rank.setdefault("".join(pair), position)
    return [-float(rank[token]) if token in rank else _NEVER for token in tokens]


def _prefixes(normalizer: dict[str, Any] | None, steps: tuple[dict[str, Any], ...]) -> bool:
    """Whether a SentencePiece tokenizer puts a blank before a text."""
    prepends = any(step["type"] == "Prepend" and step["prepend"] == _BLANK for step in _steps(normalizer))
    schemes = [step.get("prepend_scheme", "always") for step in steps if step["type"] == "Metaspace"]
    return prepends or any(scheme != "never" for scheme in schemes)
