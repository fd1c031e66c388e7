"""Token ids in tokenizer.json outside the vocabulary: tokens that the post-processor and the padding insert."""

from collections.abc import Callable
from typing import Any


def inserted_ids(contents: dict[str, Any]) -> set[int]:
    """Return the ids of the tokens that a tokenizer inserts.

    Args:
        contents: Contents of tokenizer.json.
    """
    found: set[int] = set()

    def note(token: int) -> int:
        found.add(token)
        return token

    change_inserted(contents, note)
    return found


def change_inserted(contents: dict[str, Any], change: Callable[[int], int]) -> dict[str, Any]:
    """Return the sections `padding` and `post_processor` of tokenizer.json, where they exist, with changed ids."""
    changed: dict[str, Any] = {}
    if padding := contents.get("padding"):
        changed["padding"] = {**padding, "pad_id": change(padding["pad_id"])}
    if post_processor := contents.get("post_processor"):
        changed["post_processor"] = _change_step(post_processor, change)
    return changed


def _change_step(step: dict[str, Any], change: Callable[[int], int]) -> dict[str, Any]:
    """Return a post-processor with changed ids.

    `TemplateProcessing` lists the ids of each special token that it inserts. `BertProcessing` and `RobertaProcessing`
    have pairs of a token and its id. `Sequence` has post-processors inside.
    """
    changed = dict(step)
    if "processors" in step:
        changed["processors"] = [_change_step(inner, change) for inner in step["processors"]]
    if "special_tokens" in step:
        tokens = step["special_tokens"].items()
        changed["special_tokens"] = {name: {**token, "ids": [*map(change, token["ids"])]} for name, token in tokens}
    for key in {"sep", "cls"} & step.keys():
        name, token = step[key]
        changed[key] = [name, change(token)]
    return changed
