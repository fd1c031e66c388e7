"""Statements about a pruned model, made from its record (secateur.json), that card and page share."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.base.words import format_count, joined
from secateur.fit.recovery import all_recoveries
from secateur.formats.format import format_class
from secateur.model.axes import Width, totals
from secateur.report.summary import before_and_after, estimated_loss, pruned_part
from secateur.write.record import tokens_kept


def statements(record: Mapping[str, Any], measured: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return what card and page both say, by the names of the places in their templates.

    Args:
        record: The contents of secateur.json.
        measured: Rows of figures measured after pruning: label, this model's value, the base model's value, ratio.
    """
    loads = record["loads"]
    # A training or an earlier pruning also changed the model: errors and costs leave these out.
    is_about_pruning_alone = bool(record.get("earlier") or record.get("retrained"))
    by = " by the last pruning" * is_about_pruning_alone
    return {
        "name": model_name(original(record)),
        "last_step": _last_step(record),
        "units_kept": _units_kept(record),
        "recovery": all_recoveries()[record["options"]["recovery"]].summary,
        "column_before": "before the last step" if record.get("earlier") else "before",
        "figures": [*_sizes(record), *((label, base, here, ratio) for label, here, base, ratio in measured)],
        "expected_cost": "" if record["cost"] is None else estimated_loss(record["cost"], by),
        "is_about_pruning_alone": is_about_pruning_alone,
        "auto_class": loads["class"],
        "loading": format_class(loads["format"]).how_to_load(loads["class"], "THIS_FOLDER"),
        "chain": _chain(record),
        "commands": _commands(record),
        "versions": ", ".join(f"{name} {record[name]}" for name in ("secateur", "torch", "transformers")),
    }


def model_name(record: Mapping[str, Any]) -> str:
    """Return the hub id of the model that was pruned, or the name of its folder or file."""
    return hub_id(record) or Path(str(record["model"])).name


def hub_id(record: Mapping[str, Any]) -> str | None:
    """Return the hub id of the model that was pruned; None for a folder or a file."""
    return str(record["model"]) if record.get("on_hub") else None


def original(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the record of the first pruning, of the dense model."""
    first: Mapping[str, Any] = next(iter(record.get("earlier", [])), record)
    return first


def _commands(record: Mapping[str, Any]) -> list[str]:
    """Return the commands that made this model from the dense one: each pruning, with what came after it."""
    steps = (*record.get("earlier", []), record)
    return [command for step in steps for command in (str(step["command"]), *step.get("later", []))]


def _chain(record: Mapping[str, Any]) -> list[str]:
    """Return one line for each pruning from the dense model to this one: the model, the share that was removed, and
    the tokens that were kept if some were cut.

    The list is empty if the model was pruned once.
    """
    lines = []
    for step in (*record["earlier"], record) if record.get("earlier") else ():
        share, then = step.get("sparsity", {}).get("reached"), ", then retrained" if step.get("retrained") else ""
        part = pruned_part(step.get("options", {}).get("blocks"))
        removed = "pruned" if share is None else f"{share:.1%} of {part} removed"
        tokens = tokens_kept(step)
        kept = f", {tokens[1]:,} of {tokens[0]:,} tokens kept" if tokens else ""
        lines.append(f"{model_name(step)}: {removed}{kept}{then}")
    return lines


def _sizes(record: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return rows of a table of sizes: label, value before pruning, value after pruning, ratio."""
    forms: dict[str, tuple[str, Callable[[int], str]]] = {
        "parameters": ("parameters", format_count),
        "bytes": ("weights, stored alike", lambda value: f"{value / 1e6:,.1f} MB"),
        "cache_bytes": ("KV cache per token", "{:,} B".format),
        "vocabulary": ("tokens of the vocabulary", "{:,}".format),
    }
    labelled = ((*forms[key], tuple(pair)) for key, pair in record["sizes"].items())
    return [before_and_after(label, pair, form) for label, form, pair in labelled]


def _last_step(record: Mapping[str, Any]) -> str:
    """Return a clause about the share of the parameters that was removed, in the last step if there were several."""
    step = f"in the last of {len(record['earlier']) + 1} steps, " if record.get("earlier") else ""
    return f"{step}{record['sparsity']['reached']:.1%} of {pruned_part(record['options']['blocks'])} were removed"


def _units_kept(record: Mapping[str, Any]) -> str:
    """Return a clause about the number of units of each kind that are kept."""
    dense = [Width(width) for width in record["dense"]]
    pruned = {block["block"]: Width(block["width"]) for block in record["blocks"]}
    kept, total = totals([pruned.get(index, width) for index, width in enumerate(dense)]), totals(dense)
    parts = [f"{kept[label]:,} of {number:,} {label}" for label, number in total.items() if kept[label] < number]
    return f"{joined(parts)} are kept" if parts else "all units are kept"
