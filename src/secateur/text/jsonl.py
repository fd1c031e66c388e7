"""Documents of a .jsonl file: one JSON object a line, with plain text or with the messages of a conversation."""

from collections.abc import Iterator
from typing import Any

from secateur.base.errors import SecateurError
from secateur.base.json_files import parse_json
from secateur.checkpoints.tokens import ExcessError, begins_with_bos, rendered


def jsonl_documents(text: str, source: str, tokenizer: Any) -> Iterator[str]:
    """Yield the document of each line.

    Lines end at newlines only, since JSON strings may hold other line separators.

    Args:
        text: The contents of the file.
        source: Its name, for error messages.
        tokenizer: The tokenizer whose chat template renders `messages`.

    Raises:
        SecateurError: A line is not JSON, or has neither `text` nor `messages` of the right type.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _document(line, f"{source} line {number}", tokenizer)


def _document(line: str, where: str, tokenizer: Any) -> str:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise SecateurError(f"{where} is not JSON ({error}): correct or remove it") from error
    if not isinstance(row, dict):
        raise SecateurError(f"{where} is not an object: each line needs the key text or messages")
    if "text" in row:
        document = row["text"]
        if not isinstance(document, str):
            raise SecateurError(f"{where}: text is not a string but {type(document).__name__}")
    elif "messages" in row:
        document = _render(row["messages"], where, tokenizer)
    else:
        raise SecateurError(f"{where} has neither text nor messages: add one of these keys")
    try:
        document.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SecateurError(f"{where} holds half of a surrogate pair, which is not a character: remove it") from error
    return document


def _render(messages: Any, where: str, tokenizer: Any) -> str:
    """Return a conversation as the model was trained to see it, by the tokenizer's chat template."""
    if not isinstance(messages, list) or not messages or not all(isinstance(entry, dict) for entry in messages):
        raise SecateurError(f"{where}: messages is not a list of objects with role and content")
    if not has_chat_template(tokenizer):
        raise SecateurError(f"{where}: messages need a tokenizer with a chat template; use the key text instead")
    try:
        text = rendered(tokenizer, messages)
    except SecateurError as error:
        raise type(error)(f"{where}: {error}") from error
    # Many templates write BOS themselves, and every row gets BOS anyway.
    return text.removeprefix(tokenizer.bos_token) if begins_with_bos(tokenizer) else text


def render_or_join(messages: list[dict[str, str]], tokenizer: Any) -> str:
    """Return a conversation of the package's own text, turn by turn where no chat template accepts it."""
    try:
        return _render(messages, "the package's text", tokenizer)
    except ExcessError:
        raise
    except SecateurError:
        return "\n\n".join(message["content"] for message in messages)


def has_chat_template(tokenizer: Any) -> bool:
    """Return whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))
