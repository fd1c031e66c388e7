"""The tokenizer of a GGUF file, read and written. It must split text as llama.cpp does: other tokens were never seen in
training.

GGUF stores a vocabulary in one of llama.cpp's own forms. For byte-level BPE, it stores only the name of the rule by
which text is split before merging (`splits.py`).
"""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader, TokenType
from tokenizers import decoders, normalizers
from tokenizers.normalizers import Prepend, Replace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from secateur.base.errors import SecateurError
from secateur.checkpoints.tokens import begins_with_bos, encode
from secateur.gguf.splits import split_name, split_rule, steps_of

_SPECIAL = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}
"""Metadata keys of the ids of special tokens, by transformers' names of the tokens."""
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


@contextmanager
def alone(file: Path) -> Iterator[Path]:
    """Yield a folder that holds a link to a file and nothing else.

    transformers takes a tokenizer or a config that lies beside a GGUF file instead of the one inside.
    """
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        (Path(folder) / file.name).symlink_to(file.resolve())
        yield Path(folder)


def read_tokenizer(file: Path, reader: GGUFReader, read_here: bool) -> Any:
    """Return the tokenizer of a file.

    Args:
        file: The GGUF file.
        reader: The open file.
        read_here: secateur reads the weights, so that transformers has no tokenizer class for the architecture.

    Raises:
        SecateurError: The pre-tokenizer is not known here.
    """

    def stated(key: str, default: Any = None) -> Any:
        field = reader.fields.get(f"tokenizer.ggml.{key}")
        return default if field is None else field.contents()

    model = stated("model")
    rule = split_rule(stated("pre", "")) if model == "gpt2" else None
    kind: Any = PreTrainedTokenizerFast if read_here else AutoTokenizer
    with alone(file) as folder:
        tokenizer = kind.from_pretrained(folder, gguf_file=file.name)
    tokenizer.name_or_path = str(file)
    backend = tokenizer.backend_tokenizer
    if rule is not None:
        # transformers knows fewer names, and would split text as GPT-2 does.
        backend.pre_tokenizer, backend.model.ignore_merges = rule
    if model == "llama":
        # SentencePiece puts a space before a text where the file requires one. transformers adds the space whatever the
        # file says, and only before the first word.
        add, remove = ([Prepend(_SPACE)], [decoders.Strip(" ", 1, 0)]) if stated("add_space_prefix", True) else ([], [])
        backend.normalizer, backend.pre_tokenizer = normalizers.Sequence([*add, Replace(" ", _SPACE)]), None
        steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *remove]
        backend.decoder = decoders.Sequence(steps)
    return tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """Vocabulary and settings of a tokenizer, in the form that GGUF has for them."""

    metadata: dict[str, Any]
    """Metadata, by keys without `tokenizer.ggml`. Values of None are not written."""
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
    stored = _tokenizer_json(tokenizer)
    byte_level = _is_byte_level(stored)
    tokens, types = _tokens(stored, size, byte_level)
    ids = {key: getattr(tokenizer, f"{name}_token_id", None) for name, key in _SPECIAL.items()}
    plain, full = encode(tokenizer, "a"), encode(tokenizer, "a", special=True)
    merges = stored["model"]["merges"]
    pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in merges]
    metadata = {
        "model": "gpt2" if byte_level else "llama",
        "pre": split_name(stored) if byte_level else "default",
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(pair) for pair in pairs] if byte_level else None,
        "scores": None if byte_level else _scores(tokens, pairs),
        "add_space_prefix": not byte_level and _has_space_prefix(stored),
        **{key: index for key, index in ids.items() if index is not None and index < size},
        "add_bos_token": begins_with_bos(tokenizer),
        "add_eos_token": len(full) > len(plain) and full[-1] == tokenizer.eos_token_id,
    }
    return Vocabulary(metadata, tokenizer.chat_template, _strips(stored, size))


def _tokenizer_json(tokenizer: Any) -> dict[str, Any]:
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
    return any(step["type"] == "ByteLevel" for step in steps_of(stored.get("pre_tokenizer")))


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
    normalizers, pre_tokenizers = (steps_of(stored.get(part)) for part in ("normalizer", "pre_tokenizer"))
    prepends = (step["type"] == "Prepend" and step["prepend"] == _SPACE for step in normalizers)
    schemes = (step.get("prepend_scheme", "always") for step in pre_tokenizers if step["type"] == "Metaspace")
    return any(prepends) or any(scheme != "never" for scheme in schemes)
