"""Rules by which byte-level BPE splits text before merging, and llama.cpp's names of them.

A GGUF file holds only the *name* of the rule, its pre-tokenizer. When secateur writes a file, it looks up the name by
the rule in tokenizer.json. A fine-tuned or rebuilt tokenizer thus gets the same name as the original. When secateur
reads a file, it looks up the rule by the name. Unknown rules and names are refused, because text would silently be
split at other places.
"""

from collections.abc import Iterator
from typing import Any

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, Punctuation, Sequence, Split

from secateur.base.errors import SecateurError

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

_MARKS_AND_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_DIGITS, _NUMBERS, _PUNCTUATION, _WORDS = "single digits", "numbers", "punctuation", "GPT-2 words"
_MADE = {
    _DIGITS: Digits(individual_digits=True),
    _NUMBERS: Digits(individual_digits=False),
    _PUNCTUATION: Punctuation("contiguous"),
    _WORDS: ByteLevel(add_prefix_space=False, use_regex=True),
}
"""Splits that are no regular expressions, as steps of a pre-tokenizer."""

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
    ((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _MARKS_AND_WORDS), False): "deepseek-v3",
}
"""llama.cpp's names of pre-tokenizers, by their splits in order, and by whether a word that is in the vocabulary
becomes one token without merging its characters (`ignore_merges`)."""
SAME_RULE = {
    **dict.fromkeys(("exaone4", "jais", "mpt", "olmo", "phi-2"), "gpt-2"),
    **dict.fromkeys(("command-r", "refact", "starcoder"), "smollm"),
    **dict.fromkeys(
        ("falcon-h1", "falcon3", "glm4", "glm5", "lfm2", "llama-v3", "llama3", "midm-2.0", "pixtral"), "llama-bpe"
    ),
    **dict.fromkeys(("chatglm-bpe", "jina-v5-nano", "smaug-bpe"), "dbrx"),
    **dict.fromkeys(("deepseek-r1-qwen", "f2llmv2", "hunyuan", "kormo", "megrez", "solar-open"), "qwen2"),
    **dict.fromkeys(("kanana2", "llama4", "minimax-m2", "talkie"), "gpt-4o"),
}
"""Names of rules that have another name in `PRE_TOKENIZERS`, and that name."""


def split_name(stored: dict[str, Any]) -> str:
    """Return llama.cpp's name of the rule in a byte-level tokenizer.

    Args:
        stored: Contents of tokenizer.json.

    Raises:
        SecateurError: secateur knows no name for the rule.
    """
    splits = tuple(filter(None, map(_split, steps_of(stored.get("pre_tokenizer")))))
    name = PRE_TOKENIZERS.get((splits, bool(stored["model"].get("ignore_merges"))))
    if name is None:
        known = ", ".join(sorted(PRE_TOKENIZERS.values()))
        raise SecateurError(
            f"secateur does not know what llama.cpp calls the rule by which this tokenizer splits text (known: "
            f"{known}); add the rule to secateur/gguf/splits.py, or keep the safetensors folder"
        )
    return name


def split_rule(name: str) -> tuple[Any, bool]:
    """Return the rule that llama.cpp calls by a name: the pre-tokenizer, and the value of `ignore_merges`.

    Raises:
        SecateurError: secateur does not know the name.
    """
    rules = {known: rule for rule, known in PRE_TOKENIZERS.items()}
    rule = rules.get(SAME_RULE.get(name, name))
    if rule is None:
        raise SecateurError(
            f"its pre-tokenizer (tokenizer.ggml.pre) is not known to secateur: {name or 'none is named'}"
        )
    splits, whole_words = rule
    # GPT-2's step also turns characters into bytes; without it, a last step does that.
    bytes_only = [] if _WORDS in splits else [ByteLevel(add_prefix_space=False, use_regex=False)]
    steps = [_MADE.get(split) or Split(Regex(split), "isolated") for split in splits]
    return Sequence([*steps, *bytes_only]), whole_words


def steps_of(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield normalizers or pre-tokenizers of tokenizer.json in order, with sequences unrolled."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
    for inner in part.get("pretokenizers") or part.get("normalizers") or ():
        yield from steps_of(inner)


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
