"""The tokenizer of a checkpoint, read from tokenizer.json and other JSON files."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from secateur.base.errors import SecateurError
from secateur.base.json_files import parse_json
from secateur.vocabulary.alphabets import Alphabet, Bytes, Characters
from secateur.vocabulary.kept import KeptTokens
from secateur.vocabulary.models import Bpe, TokenModel, Unigram
from secateur.vocabulary.scripts import main_scripts, steps_of, with_normalised
from secateur.vocabulary.token_ids import inserted_ids

NAME = "tokenizer.json"
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files that name special and added tokens too."""
_MODELS: dict[str, type[TokenModel]] = {"BPE": Bpe, "Unigram": Unigram}


@dataclass(frozen=True)
class StoredTokenizer:
    """A tokenizer whose vocabulary can be cut."""

    folder: Path
    contents: dict[str, Any]
    """Contents of tokenizer.json."""
    side_files: dict[str, Any]
    """Contents of the other JSON files by name."""
    model: TokenModel
    alphabet: Alphabet
    added: dict[str, int]
    """Ids of special and added tokens, which are found in a text before the model splits the rest."""

    @property
    def size(self) -> int:
        """Number of ids: the largest id of a token, plus 1."""
        return max([*self.model.spellings, *self.added.values()]) + 1

    @property
    def keeps_all_text(self) -> bool:
        """Whether characters without a token fall back to bytes; if not, they become the unknown token."""
        return self.alphabet.keeps_all(self.model)

    def keeping(self, ids: Iterable[int], rows: int) -> KeptTokens:
        """Return the tokens with these ids, and the added tokens whose ids are beyond the rows of the embedding."""
        return KeptTokens(tuple(ids), tuple(sorted(token for token in self.added.values() if token >= rows)))

    def named(self) -> set[int]:
        """Return the ids of special and added tokens, and of other tokens that the files name or insert."""
        names = {name for contents in self.side_files.values() for name in _token_names(contents)}
        named = {token for token, spelling in self.model.spellings.items() if spelling in names}
        return named | {*self.added.values()} | inserted_ids(self.contents)

    def scripts(self) -> tuple[str, ...]:
        """Return the codes of the scripts of all tokens, the most frequent first."""
        return main_scripts(((self.alphabet.text_of(text), 1) for text in self.model.spellings.values()), share=0)


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
        tokenizer = _tokenizer(folder, contents, side_files)
        # The library finds what is not read here.
        Tokenizer.from_file(str(path))
        _check_entries(tokenizer)
        return tokenizer
    except SecateurError as error:
        raise SecateurError(f"{path}: {error}") from error
    except Exception as error:  # the tokenizers library raises errors of no other class
        raise SecateurError(f"{path}: not a valid tokenizer ({error!r}); download it again") from error


def _tokenizer(folder: Path, contents: dict[str, Any], side_files: dict[str, Any]) -> StoredTokenizer:
    """Return a tokenizer from the contents of its files; errors as in `read_tokenizer`, without the path."""
    model = _model(contents["model"])
    steps = [*steps_of(contents.get("pre_tokenizer")), *steps_of(contents.get("normalizer"))]
    alphabet = Bytes() if any(step["type"] == "ByteLevel" for step in steps) else Characters()
    added = {token["content"]: token["id"] for token in contents.get("added_tokens") or ()}
    added |= _listed(side_files)
    _check_added(model, added)
    return StoredTokenizer(folder, contents, side_files, model, alphabet, added)


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
    with_normalised(frozenset("a"), tokenizer.contents)


def _model(stored: dict[str, Any]) -> TokenModel:
    """Return the model of a tokenizer; old files do not state its type."""
    kind = stored.get("type", "BPE" if "merges" in stored else "WordPiece")
    if kind not in _MODELS:
        raise SecateurError(f"the tokenizer is {kind}; only vocabularies of {' and '.join(_MODELS)} can be cut")
    return _MODELS[kind].read(stored)


def _check_added(model: TokenModel, added: dict[str, int]) -> None:
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
