"""The alphabet in which a vocabulary spells its tokens: bytes or characters.

Byte-level BPE cuts the UTF-8 bytes of a text anywhere, so a token can begin or end inside a character. In
tokenizer.json each byte is spelled as one printable character (GPT-2's table). All other vocabularies cut between
characters; some have tokens such as `<0x41>` for the bytes of characters that they do not contain.
"""

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache

from tokenizers.pre_tokenizers import ByteLevel

from secateur.vocabulary.models import TokenModel

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Alphabet(ABC):
    """Meaning of the spellings of tokens."""

    @abstractmethod
    def occurs_in(self, characters: frozenset[str]) -> Callable[[str], bool]:
        """Return a function that tells whether some text of these characters contains the token with a spelling."""

    @abstractmethod
    def is_byte(self, spelling: str) -> bool:
        """Return whether a token is a single byte."""

    @abstractmethod
    def keeps_all(self, model: TokenModel) -> bool:
        """Return whether bytes spell the characters that a model has no token for, so that no text is lost."""

    @abstractmethod
    def text_of(self, spelling: str) -> str:
        """Return the text of a token, or nothing if the token begins or ends inside a character."""


class Characters(Alphabet):
    """Tokens are strings of characters."""

    def occurs_in(self, characters: frozenset[str]) -> Callable[[str], bool]:
        """Return a function that tells whether a token has only these characters."""
        return characters.issuperset

    def is_byte(self, spelling: str) -> bool:
        """Return whether a token is spelled like `<0x41>`."""
        return _BYTE_TOKEN.fullmatch(spelling) is not None

    def keeps_all(self, model: TokenModel) -> bool:
        """Return whether the model falls back to bytes, and has a token for each."""
        return bool(model.stored.get("byte_fallback")) and sum(map(self.is_byte, model.spellings.values())) == 256

    def text_of(self, spelling: str) -> str:
        """Return the spelling."""
        return spelling


class Bytes(Alphabet):
    """Tokens are strings of bytes."""

    def occurs_in(self, characters: frozenset[str]) -> Callable[[str], bool]:
        """Return a function that tells whether a token has only these characters, and fragments of them at its ends."""
        encoded = [character.encode() for character in characters if len(character.encode()) > 1]
        beginnings = {code[:stop] for code in encoded for stop in range(1, len(code))}
        ends = {code[start:] for code in encoded for start in range(1, len(code))}
        middles = {code[start:stop] for code in encoded for start in range(1, len(code)) for stop in range(start, 4)}

        def occurs(spelling: str) -> bool:
            data = _bytes_of(spelling)
            if data is None:
                return False
            start = next((place for place, byte in enumerate(data) if byte & 0xC0 != 0x80), len(data))
            if start == len(data):
                return data in middles or data in ends
            try:
                text, length = codecs.utf_8_decode(data[start:], "strict", False)
            except UnicodeDecodeError:
                return False
            beginning = data[start + length :]
            return (
                characters.issuperset(text)
                and (start == 0 or data[:start] in ends)
                and (not beginning or beginning in beginnings)
            )

        return occurs

    def is_byte(self, spelling: str) -> bool:
        """Return whether a token has one byte."""
        return len(spelling) == 1 and spelling in byte_characters()

    def keeps_all(self, model: TokenModel) -> bool:
        """Return True: the model spells all characters with bytes."""
        return True

    def text_of(self, spelling: str) -> str:
        """Return the text of a token's bytes, or nothing if they are not whole characters."""
        try:
            return (_bytes_of(spelling) or b"").decode()
        except UnicodeDecodeError:
            return ""


@cache
def byte_characters() -> dict[str, int]:
    """Return GPT-2's table: the character that spells each byte, with the byte.

    Printable Latin-1 characters spell themselves. Each other byte is spelled by a character after Latin-1, in order.
    """
    alphabet = sorted(ByteLevel.alphabet())
    themselves = {character: ord(character) for character in alphabet if ord(character) < 256}
    others = sorted(set(range(256)) - set(themselves.values()))
    return themselves | dict(zip(alphabet[len(themselves) :], others, strict=True))


def _bytes_of(spelling: str) -> bytes | None:
    """Return the bytes of a token, or None if its spelling contains a character that spells no byte."""
    table = byte_characters()
    try:
        return bytes([table[character] for character in spelling])
    except KeyError:
        return None
