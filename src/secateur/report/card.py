"""Model card of a pruned folder, README.md: what was removed, how good the model is, how to load it, how it was made.

card.md is the text. It is filled from the record of the run (secateur.json) alone, so that it can be made again with
measurements.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from secateur.report.record_text import hub_id, original, statements
from secateur.report.template import fill

CARD, PAGE = "README.md", "report.html"
BASE_CARD = "README.base.md"
"""File name of the base model's card in the pruned folder."""
INHERITED = ("license", "license_name", "license_link", "language")
"""Metadata keys that the pruned model takes over from the card of its base model."""
FRONT = re.compile(r"\A---\s*\n(.{0,20000}?)\n---\s*(\n|\Z)", re.DOTALL)
"""YAML metadata at the beginning of a card."""


def card(
    record: Mapping[str, Any],
    *,
    base_card: str | None = None,
    measured: Sequence[Sequence[str]] = (),
    notes: Sequence[str] = (),
) -> str:
    """Return the text of the card.

    Args:
        record: The contents of secateur.json.
        base_card: The card of the base model, if it has one.
        measured: Rows of figures measured after pruning: label, this model's value, the base model's value, ratio.
        notes: Lines about how these figures were measured.
    """
    metadata = yaml.safe_dump(_metadata(record, base_card), sort_keys=False, allow_unicode=True).strip()
    return fill(
        "card.md",
        **statements(record, measured),
        metadata=metadata,
        vocabulary=record.get("vocabulary"),
        measured=measured,
        notes=notes,
        vllm_unsupported=record["loads"]["vllm"],
        perplexities=[training["perplexity"] for training in record.get("retrained", [])],
        base_card=base_card,
    )


def _metadata(record: Mapping[str, Any], base_card: str | None) -> dict[str, Any]:
    """Return the metadata of the card, which the hub reads."""
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": record["loads"]["task"]}
    if (base := hub_id(original(record))) is not None:
        metadata["base_model"] = base
    metadata |= {key: value for key, value in _front(base_card or "").items() if key in INHERITED}
    return metadata | {"tags": ["pruned", "secateur"]}


def _front(text: str) -> dict[str, Any]:
    """Return the metadata of a card as far as values are strings or lists of strings; empty if it is unreadable."""
    found = FRONT.match(text.replace("\r\n", "\n"))
    # Without anchors (&), since nested aliases may expand to any size.
    if not found or "&" in found[1]:
        return {}
    try:
        values = yaml.safe_load(found[1])
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return {key: value for key, value in values.items() if _is_text(value)} if isinstance(values, dict) else {}


def _is_text(value: Any) -> bool:
    """Return whether a value is a string or a list of strings."""
    return all(isinstance(one, str) for one in (value if isinstance(value, list) else [value]))
