"""Token ids of texts, and whether a tokenizer puts the beginning-of-sequence token (BOS) first."""

from typing import Any

from secateur.base.errors import SecateurError
from secateur.base.quiet import first_line


def encode(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    """Return the token ids of a text of any length.

    Raises:
        SecateurError: The tokenizer has no ids for it.
    """
    try:
        encoded = tokenizer(
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
    return list(encoded["input_ids"])


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
