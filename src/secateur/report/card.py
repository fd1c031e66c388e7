"""Model card of a pruned folder, README.md: what was removed, how good the model is, how to load it, how it was made.

The card is made from the record of the run (secateur.json) alone, so that it can be made again with measurements.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import yaml

from secateur.fit.recovery import all_recoveries
from secateur.report.record_text import (
    chain,
    column_before,
    commands,
    expected_cost,
    hub_id,
    last_step,
    loading,
    loading_code,
    original,
    original_name,
    sizes,
    units_kept,
    versions,
    vocabulary_kept,
)

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
    sections = [
        f"# {_plain(original_name(record))}, pruned",
        *_summary(record),
        "## Size and quality",
        *_figures(record, measured, notes),
        "## How to load it",
        *_instructions(record),
        "## How it was made",
        *_making(record, base_card),
    ]
    return f"---\n{metadata}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def _summary(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was removed and how the other weights changed."""
    yield (
        f"This is `{_code(original_name(record))}` after structured pruning: {last_step(record)}, and "
        f"{units_kept(record)}. {all_recoveries()[record['options']['recovery']].summary} {_training(record)} "
        f"[{PAGE}]({PAGE}) shows what was removed from each block."
    )
    yield vocabulary_kept(record)


def _training(record: Mapping[str, Any]) -> str:
    """Return a sentence about training after the pruning."""
    return "Then the model was retrained." if record.get("retrained") else "It was not trained afterwards."


def _figures(record: Mapping[str, Any], measured: Sequence[Sequence[str]], notes: Sequence[str]) -> Iterator[str]:
    """Yield the table of sizes and measurements, and what is known of the quality."""
    rows = [f"| {label} | {base} | {here} | {ratio} |" for label, base, here, ratio in sizes(record)]
    rows += [f"| {_plain(label)} | {base} | {here} | {ratio} |" for label, here, base, ratio in measured]
    yield "\n".join([f"| | {column_before(record)} | after | ratio |", "|---|---|---|---|", *rows])
    yield "\n".join(f"- {_plain(note)}" for note in notes)
    yield expected_cost(record)
    if not measured:
        yield "The quality of this model has not been measured yet; `secateur eval` measures it."
    yield (
        "A pruned model may have lost abilities that its calibration did not use: measure it on your own task "
        "before you rely on it."
    )


def _instructions(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield how to load the model with transformers, vLLM and llama.cpp."""
    how, unsupported = loading(record), record["loads"]["vllm"]
    yield f"```python\n{loading_code(record, 'THIS_FOLDER')}\n```"
    if how.registered:
        yield (
            f"With secateur installed, `import secateur; {how.registered}` replaces `trust_remote_code=True`. Without "
            "either of them, transformers stops with an error, such as one about tensor shapes and "
            "`ignore_mismatched_sizes`."
        )
    serve = f"vllm serve THIS_FOLDER{' --trust-remote-code' * how.runs_code}"
    vllm = f"vLLM cannot serve this model: {unsupported}." if unsupported else f"With vLLM: `{serve}`."
    llama_cpp = "For llama.cpp, if it supports the architecture with these widths"
    yield f"{vllm} {llama_cpp}: `secateur export THIS_FOLDER model.gguf`."


def _making(record: Mapping[str, Any], base_card: str | None) -> Iterator[str]:
    """Yield the chain of models, the commands, retraining, versions and licence."""
    yield "\n".join(f"{number}. {_plain(line)}" for number, line in enumerate(chain(record), 1))
    lines = "\n".join(map(_code, commands(record)))
    yield f"```bash\n{lines}\n```"
    if passes := [one["perplexity"] for one in record.get("retrained", [])]:
        steps = ", then ".join(f"{one['before']:.2f} to {one['after']:.2f}" for one in passes)
        yield f"Retraining changed the perplexity on held-out rows from {steps}."
    yield f"Made with {versions(record)}."
    copied = f", and its model card is [{BASE_CARD}]({BASE_CARD})" if base_card else ""
    yield (
        "The licence of the base model applies to this model. Licence files of the base model, if it has any, are in "
        f"this folder{copied}."
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


def _plain(text: str) -> str:
    """Return text on one line in which Markdown and HTML are escaped."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", escape(" ".join(text.split()), quote=False))


def _code(text: str) -> str:
    """Return text on one line that cannot end a code span."""
    return " ".join(text.replace("`", "'").split())
