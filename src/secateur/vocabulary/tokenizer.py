"""The tokenizer of a checkpoint, read from tokenizer.json and other JSON files.

Byte-level BPE cuts the UTF-8 bytes of a text anywhere, so a token can begin or end inside a character. In
tokenizer.json each byte is spelled as one printable character (GPT-2's table). All other vocabularies cut between
characters; some have tokens such as `<0x41>` for the bytes of characters that they do not contain.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import ByteLevel

from secateur.base.errors import SecateurError
from secateur.base.json_files import parse_json
from secateur.vocabulary.kept import KeptTokens
from secateur.vocabulary.models import Bpe, Unigram
from secateur.vocabulary.scripts import main_scripts
from secateur.vocabulary.token_ids import ids_in

NAME = "tokenizer.json"
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files that name special and added tokens too."""
INSERTING = ("padding", "post_processor")
"""Sections of tokenizer.json with the ids of tokens that it inserts."""
_MODELS: dict[str, type[Bpe | Unigram]] = {"BPE": Bpe, "Unigram": Unigram}


@dataclass(frozen=True)
class StoredTokenizer:
    """A tokenizer whose vocabulary can be cut."""

    folder: Path
    contents: dict[str, Any]
    """Contents of tokenizer.json."""
    side_files: dict[str, Any]
    """Contents of the other JSON files by name."""
    model: Bpe | Unigram
    added: dict[str, int]
    """Ids of special and added tokens, which are found in a text before the model splits the rest."""
    normaliser: Normalizer | None = None
    """Normaliser that changes a text before the model splits it."""

    @property
    def size(self) -> int:
        """Number of ids: the largest id of a token, plus 1."""
        return max([*self.model.spellings, *self.added.values()]) + 1

    @property
    def is_byte_level(self) -> bool:
        """Whether tokens are strings of bytes."""
        return '"ByteLevel"' in json.dumps([self.contents.get(step) for step in ("pre_tokenizer", "normalizer")])

    @property
    def keeps_all_text(self) -> bool:
        """Whether characters without a token fall back to bytes; if not, they become the unknown token."""
        falls_back = bool(self.model.stored.get("byte_fallback")) and len(self.bytes_alone()) == 256
        return self.is_byte_level or falls_back

    @cached_property
    def codes(self) -> dict[int, bytes]:
        """UTF-8 bytes of each token of the model, except for tokens with a character that spells no byte."""
        spellings = self.model.spellings
        if not self.is_byte_level:
            return {token: spelling.encode() for token, spelling in spellings.items()}
        table = byte_characters()
        fits = {token: spelling for token, spelling in spellings.items() if table.keys() >= set(spelling)}
        return {token: bytes(table[character] for character in spelling) for token, spelling in fits.items()}

    def bytes_alone(self) -> set[int]:
        """Return the ids of the tokens that are a single byte."""
        if self.is_byte_level:
            return {token for token, code in self.codes.items() if len(code) == 1}
        return {token for token, spelling in self.model.spellings.items() if re.fullmatch("<0x[0-9A-F]{2}>", spelling)}

    def occurring(self, characters: frozenset[str]) -> set[int]:
        """Return the ids of the tokens that occur in some text of these characters.

        Such a token has whole characters only, and at its ends maybe a part of one.
        """
        encoded = [character.encode() for character in characters]
        parts = {code[start:stop] for code in encoded for start in range(4) for stop in range(start, 5)}
        ends = {code[start:] for code in encoded for start in range(1, 5)}

        def occurs(code: bytes) -> bool:
            first = len(code) - len(code.lstrip(_CONTINUATION))
            try:
                text, length = codecs.utf_8_decode(code[first:], "strict", False)
            except UnicodeDecodeError:
                return False
            begins_well = code[:first] in (ends if first < len(code) else parts)
            return begins_well and code[first + length :] in parts and characters.issuperset(text)

        return {token for token, code in self.codes.items() if occurs(code)}

    def keeping(self, ids: Iterable[int], rows: int) -> KeptTokens:
        """Return the tokens with these ids, and the added tokens whose ids are beyond the rows of the embedding."""
        return KeptTokens(tuple(ids), tuple(sorted(token for token in self.added.values() if token >= rows)))

    def named(self) -> set[int]:
        """Return the ids of special and added tokens, and of other tokens that the files name or insert."""
        names = {name for contents in self.side_files.values() for name in _token_names(contents)}
        named = {token for token, spelling in self.model.spellings.items() if spelling in names}
        return named | {*self.added.values()} | ids_in({key: self.contents.get(key) for key in INSERTING}, self.size)

    def text_of(self, token: int) -> str:
        """Return the text of a token of the model; nothing for others, or if it has a part of a character."""
        try:
            return self.codes.get(token, b"").decode()
        except UnicodeDecodeError:
            return ""

    def scripts(self, counts: Mapping[int, int], share: float = 0.01) -> tuple[str, ...]:
        """Return the codes of the main scripts of a text with these occurrences of tokens; see `main_scripts`."""
        return main_scripts(((self.text_of(token), count) for token, count in counts.items()), share)


_CONTINUATION = bytes(range(0x80, 0xC0))
"""Bytes of a character after its first one."""


def byte_characters() -> dict[str, int]:
    """Return GPT-2's table: the character that spells each byte, with the byte.

    Printable Latin-1 characters spell themselves. Each other byte is spelled by a character after Latin-1, in order.
    """
    alphabet = sorted(ByteLevel.alphabet())
    themselves = {character: ord(character) for character in alphabet if ord(character) < 256}
    others = sorted(set(range(256)) - set(themselves.values()))
    return themselves | dict(zip(alphabet[len(themselves) :], others, strict=True))


def read_tokenizer(folder: Path) -> StoredTokenizer:
    """Return the tokenizer of a folder.

    Raises:
        SecateurError: The folder has no tokenizer.json, or its vocabulary cannot be cut.
    """
    path = folder / NAME
    if not path.is_file():
        raise SecateurError(
            f'{folder}: no tokenizer.json, from which a vocabulary is cut; write one: python -c "from transformers '
            f"import AutoTokenizer; AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    contents = read_json_object(path)
    side_files = {name: read_json_object(folder / name) for name in SIDE_FILES if (folder / name).is_file()}
    try:
        model = _model(contents["model"])
        added = {token["content"]: token["id"] for token in contents.get("added_tokens") or ()} | _listed(side_files)
        _check_added(model, added)
        # The library finds what is not read here.
        backend = Tokenizer.from_file(str(path))
        tokenizer = StoredTokenizer(folder, contents, side_files, model, added, backend.normalizer)
        _check_entries(tokenizer)
        return tokenizer
    except SecateurError as error:
        raise SecateurError(f"{path}: {error}") from error
    except Exception as error:  # the tokenizers library raises errors of no other class
        raise SecateurError(f"{path}: not a valid tokenizer ({error!r}); download it again") from error


def _check_entries(tokenizer: StoredTokenizer) -> None:
    """Check ids, and everything else that is read only later, so that it fails here.

    Raises:
        ValueError: An id is not a number of a token.
        SecateurError: The tokenizer inserts an id that no token has.
        Exception: Another entry is not what the tokenizers library writes.
    """
    if not tokenizer.model.spellings:
        raise ValueError("its vocabulary is empty")
    for token in (*tokenizer.model.spellings, *tokenizer.added.values()):
        if type(token) is not int or token < 0:
            raise ValueError(f"the id {token!r}")
    tokenizer.model.fixed()
    if unknown := tokenizer.named() - {*tokenizer.model.spellings, *tokenizer.added.values()}:
        raise SecateurError(f"the post-processor or the padding inserts the id {min(unknown)}, which no token has")


def _model(stored: dict[str, Any]) -> Bpe | Unigram:
    """Return the model of a tokenizer; old files do not state its type."""
    kind = stored.get("type", "BPE" if "merges" in stored else "WordPiece")
    if kind not in _MODELS:
        raise SecateurError(f"the tokenizer is {kind}; only vocabularies of {' and '.join(_MODELS)} can be cut")
    return _MODELS[kind].read(stored)


def _check_added(model: Bpe | Unigram, added: dict[str, int]) -> None:
    """Check that added tokens have the ids that the tokenizers library gives them.

    Raises:
        SecateurError: A token has another id.
    """
    ids = {spelling: token for token, spelling in model.spellings.items()}
    outside = sorted(token for name, token in added.items() if name not in ids)
    expected = {name: ids[name] for name in added.keys() & ids.keys()}
    places = dict(zip(outside, range(len(ids), len(ids) + len(outside)), strict=True))
    for name, token in added.items():
        right = expected.get(name, places.get(token))
        if token != right:
            raise SecateurError(
                f"the added token {name!r} has the id {token}, but is loaded with the id {right}; correct the file"
            )


def _listed(side_files: dict[str, Any]) -> dict[str, int]:
    """Return the ids of the added tokens that the other JSON files list."""
    decoder = side_files.get("tokenizer_config.json", {}).get("added_tokens_decoder") or {}
    listed = {token["content"]: int(number) for number, token in decoder.items()}
    return listed | side_files.get("added_tokens.json", {})


def _token_names(config: dict[str, Any]) -> Iterator[str]:
    """Yield the tokens that keys such as `bos_token` and `additional_special_tokens` name."""
    for key, value in config.items():
        if key.endswith(("_token", "_tokens")):
            yield from _texts(value)


def _texts(value: Any) -> Iterator[str]:
    """Yield the text of a token, or of several: strings, objects with their `content`, lists or objects of these."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts([value["content"]] if "content" in value else [*value.values()])
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the contents of a JSON file.

    Raises:
        SecateurError: The file is not a JSON object.
    """
    try:
        contents = parse_json(path.read_bytes())
    except ValueError as error:
        raise SecateurError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(contents, dict):
        raise SecateurError(f"{path}: not a JSON object; download it again")
    return contents
