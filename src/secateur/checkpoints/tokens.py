"""Token ids of texts, and whether a tokenizer puts the beginning-of-sequence token (BOS) first."""

import resource
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from secateur.base.errors import SecateurError
from secateur.base.quiet import first_line

TEMPLATE_SECONDS = 5.0
"""CPU time that a chat template may take for one conversation."""
TEMPLATE_BYTES = 2**30
"""Memory that a chat template may take."""


class ExcessError(SecateurError):
    """Error of a chat template that takes too long or writes too much."""


def rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """Return the text that a tokenizer's chat template makes of a conversation, within bounds of time and size.

    Raises:
        SecateurError: The template, a program by the model's author, refuses the messages or exceeds the bounds.
    """
    try:
        with _bounded():
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
        if len(text) > 100_000 + 10 * len(str(messages)):
            raise MemoryError
        return text
    except (TimeoutError, MemoryError) as error:
        raise ExcessError(
            "the chat template takes too long or writes too much; correct it, or remove it from the tokenizer's files"
        ) from error
    except Exception as error:
        raise SecateurError(f"the chat template refuses these messages: {first_line(error)}") from error


@contextmanager
def _bounded() -> Iterator[None]:
    """Raise `TimeoutError` or `MemoryError` where the context takes too long or too much memory.

    Only the main thread can be interrupted, and only Linux tells how much memory there is to begin with.
    """

    def stop(*_: object) -> NoReturn:
        raise TimeoutError

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGVTALRM, stop) if is_main else None
    try:
        with suppress(OSError, ValueError):
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + TEMPLATE_BYTES, hard))
        if is_main:
            # Again every second, as the template's engine swallows some errors.
            signal.setitimer(signal.ITIMER_VIRTUAL, TEMPLATE_SECONDS, 1.0)
        yield
    finally:
        if is_main:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def encode(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    """Return the token ids of a text of any length.

    Raises:
        SecateurError: The tokenizer has no ids for it.
    """
    return list(_encoding(tokenizer, text, special)["input_ids"])


def encode_start(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of the beginning of a text: with BOS if the tokenizer adds it, but without EOS.

    Raises:
        SecateurError: The tokenizer has no ids for it.
    """
    plain, full = encode(tokenizer, text), encode(tokenizer, text, special=True)
    ends = (start + len(plain) for start in range(len(full) - len(plain) + 1))
    return full[: next((end for end in ends if full[end - len(plain) : end] == plain), len(full))]


def _encoding(tokenizer: Any, text: str, special: bool) -> Any:
    """Return what a tokenizer returns for a text of any length."""
    try:
        return tokenizer(
            text,
            add_special_tokens=special,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )
    except BaseException as error:  # the tokenizers library panics with errors that are no `Exception`
        if not is_fault(error):
            raise
        raise SecateurError(f"the model's tokenizer cannot read this text: {first_line(error)}") from error


@dataclass(frozen=True)
class EncodedText:
    """Text with its tokens, which counts the bytes of text that each run of tokens covers."""

    tokenizer: Any
    text: str
    encoding: Any
    """Result of the tokenizer's call."""

    @classmethod
    def of(cls, tokenizer: Any, text: str) -> "EncodedText":
        """Return a text with its tokens, without special tokens; errors as in `encode`."""
        return cls(tokenizer, text, _encoding(tokenizer, text, special=False))

    @property
    def ids(self) -> list[int]:
        """Token ids of the whole text."""
        return list(self.encoding["input_ids"])

    def bytes_of(self, start: int, stop: int) -> int:
        """Return the number of UTF-8 bytes of text that the tokens `start` to `stop - 1` cover.

        A token covers the characters from the end of the token before it to its own end. So characters that the
        tokenizer drops belong to the token after them, a character that is split into several tokens belongs to one of
        them, and runs of tokens that follow each other have as many bytes as their text. A tokenizer of pure Python
        does not tell the places of its tokens in the text; the bytes of the decoded tokens are counted instead, which
        differ by a few bytes where the tokenizer changes the text or a run ends inside a character.
        """
        if self.encoding.is_fast:
            first, last = self._end(start - 1), self._end(stop - 1)
            return _utf8_bytes(self.text[first:last])
        ids, before = self.encoding["input_ids"], max(0, start - 1)
        decoded = self.tokenizer.decode(ids[before:stop]), self.tokenizer.decode(ids[before:start])
        return _utf8_bytes(decoded[0]) - _utf8_bytes(decoded[1])

    def _end(self, token: int) -> int:
        """Return the number of characters of the text up to the end of a token; 0 for the token before the first."""
        return 0 if token < 0 else int(self.encoding.token_to_chars(token).end)


def _utf8_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def is_fault(error: BaseException) -> bool:
    """Return whether an exception is a failure and not an interruption: panics of the tokenizers library are no
    `Exception`s."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def begins_with_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer puts BOS before a text.

    This is found by encoding a text: tokenizers decide it in their post-processor, whatever their settings say.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return False
    plain, full = encode(tokenizer, "a"), encode(tokenizer, "a", special=True)
    return len(full) > len(plain) and full[0] == bos
