"""The model card of a pruned folder, README.md: what it was made of and how, what is left, and how it is opened.

All of it is read from the record that `prune` writes (secateur.json), so that figures measured later can be put in.
"""

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from secateur.base.words import format_count
from secateur.fit.recovery import all_recoveries
from secateur.formats.format import Loading, format_class
from secateur.model.axes import Width, totals
from secateur.report.summary import pruned_part

CARD, PAGE = "README.md", "report.html"
BASE_CARD = "README.base.md"
"""The card of the model that was pruned, as it was."""
INHERITED = ("license", "license_name", "license_link", "language")
"""What a card says of the base model that holds for the pruned one too."""
FRONT = re.compile(r"\A---\s*\n(.{0,20000}?)\n---\s*(\n|\Z)", re.DOTALL)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def card(record: Mapping[str, Any], *, base_card: str | None = None, measured: Sequence[Sequence[str]] = ()) -> str:
    """The whole card.

    Args:
        record: the contents of secateur.json.
        base_card: the card of the model that was pruned, where it has one.
        measured: rows of what was measured since: a label, this model's figure, the base model's, their ratio.
    """
    name, said = model_name(record), record["loads"]
    repair = all_recoveries()[record["options"]["recovery"]].summary
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": said["task"]}
    if HUB_ID.fullmatch(str(record["model"])) and not Path(record["model"]).exists():
        front["base_model"] = record["model"]
    front |= {key: value for key, value in _front(base_card or "").items() if key in INHERITED}
    front["tags"] = ["pruned", "secateur"]
    rows = [f"| {label} | {before} | {after} | {ratio} |" for label, before, after, ratio in sizes(record)]
    rows += [f"| {_plain(label)} | {base} | {here} | {ratio} |" for label, here, base, ratio in measured]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "---",
        f"# {_plain(name)}, pruned",
        f"Of `{_code(name)}`, {share_removed(record)}: {units_kept(record)}. "
        f"{repair} [{PAGE}]({PAGE}) shows what was removed where.",
        "\n".join(["| | before | after | ratio |", "|---|---|---|---|", *rows]),
        expected_cost(record) + ("" if measured else " Its quality was not measured here; `secateur eval` does that."),
        "## How to open it",
        f"```python\n{loading_code(record, 'THIS_FOLDER')}\n```",
        _without_code(record),
        _served(record),
        "## How it was made",
        f"```bash\n{_code(record['command'])}\n```",
        _retrained(record),
        f"{versions(record)}. The licence of the model that it is made of holds for this one; its files lie beside"
        + (f", its card as [{BASE_CARD}]({BASE_CARD})." if base_card else "."),
    ]
    head, body = lines[:3], lines[3:]
    return "\n".join(head) + "\n\n" + "\n\n".join(filter(None, body)) + "\n"


def model_name(record: Mapping[str, Any]) -> str:
    """What the model that was pruned is called, without the folders that it lay in."""
    return str(record["model"]) if HUB_ID.fullmatch(str(record["model"])) else Path(str(record["model"])).name


def sizes(record: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Label, before, after and ratio of what the model takes."""
    forms = {
        "parameters": ("parameters", format_count),
        "bytes": ("weights", lambda value: f"{value / 1e6:,.1f} MB"),
        "cache_bytes": ("cache of a token", "{:,} B".format),
    }
    rows = []
    for key, (before, after) in record["sizes"].items():
        label, form = forms[key]
        rows.append((label, form(before), form(after), f"{after / before:.3f}" if before else ""))
    return rows


def share_removed(record: Mapping[str, Any]) -> str:
    """Return the share of the parameters that is gone, in words: of all blocks, or of those that were to be pruned."""
    return f"{record['sparsity']['reached']:.1%} of {pruned_part(record['options']['blocks'])} are gone"


def units_kept(record: Mapping[str, Any]) -> str:
    """How many units of each kind stay, in words."""
    dense = [Width(width) for width in record["dense"]]
    pruned = {block["block"]: Width(block["width"]) for block in record["blocks"]}
    now = [pruned.get(index, width) for index, width in enumerate(dense)]
    kept, whole = totals(now), totals(dense)
    parts = [f"{kept[label]:,} of {before:,} {label}" for label, before in whole.items() if kept[label] < before]
    return f"{' and '.join(parts)} stay" if parts else "no unit, as nothing had to go"


def expected_cost(record: Mapping[str, Any]) -> str:
    """The loss that was expected, where prices were measured."""
    if record["cost"] is None:
        return ""
    return f"It was expected to cost {record['cost']:.2f} nats per token, module by module."


def loading_code(record: Mapping[str, Any], folder: str) -> str:
    """Python that opens the model."""
    return f"from transformers import {record['loads']['class']}\n\nmodel = {_loading(record, folder).expression}"


def _loading(record: Mapping[str, Any], folder: str = "") -> Loading:
    """Return how the folder is opened."""
    said = record["loads"]
    return format_class(said["format"]).how_to_load(said["class"], folder)


def versions(record: Mapping[str, Any]) -> str:
    """What made the model."""
    return ", ".join(f"{name} {record[name]}" for name in ("secateur", "torch", "transformers"))


def _retrained(record: Mapping[str, Any]) -> str:
    times = [one["perplexity"] for one in record.get("retrained", [])]
    if not times:
        return ""
    each = ", then ".join(f"{one['before']:.2f} to {one['after']:.2f}" for one in times)
    return f"It was trained afterwards (`secateur retrain`): perplexity on rows held out of that text from {each}."


def _without_code(record: Mapping[str, Any]) -> str:
    """The other way to open it, where there is one."""
    if not (call := _loading(record).registered):
        return ""
    return (
        f"Where secateur is installed, `import secateur; {call}` does in place of `trust_remote_code=True`. "
        "Without either, transformers stops at tensors of other shapes and speaks of `ignore_mismatched_sizes`."
    )


def _served(record: Mapping[str, Any]) -> str:
    why = record["loads"]["vllm"]
    flag = " --trust-remote-code" * _loading(record).runs_code
    vllm = f"vLLM does not serve it: {why}." if why else f"With vLLM: `vllm serve THIS_FOLDER{flag}`."
    return f"{vllm} For llama.cpp: `secateur export THIS_FOLDER model.gguf`, where it knows the architecture."


def _front(text: str) -> dict[str, Any]:
    """What stands in front of a card, as far as it is words."""
    found = FRONT.match(text.replace("\r\n", "\n"))
    try:
        values = yaml.safe_load(found[1]) if found and "&" not in found[1] else None
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, TypeError, AttributeError):
        values = None
    plain = values if isinstance(values, dict) else {}
    return {
        key: value
        for key, value in plain.items()
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))
    }


def _plain(text: str) -> str:
    """Text that is no markup, on one line."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", escape(" ".join(text.split()), quote=False))


def _code(text: str) -> str:
    return " ".join(text.replace("`", "'").split())
