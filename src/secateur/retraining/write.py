"""Retrained folder: a copy of the pruned folder with the trained weights."""

from typing import Any

from torch import Tensor

from secateur.base.output import Output
from secateur.formats.per_layer import MODELING_FILE, is_per_layer
from secateur.model.checkpoint import Checkpoint
from secateur.report.card import BASE_CARD
from secateur.report.folder import read_text, readme_and_report
from secateur.write.files import copy_into, write_json, write_text_or_json
from secateur.write.record import RECORD, read_record
from secateur.write.shards import ShardWriter, header_bytes_for


def write_retrained(checkpoint: Checkpoint, target: Output, changed: dict[str, Tensor], entry: dict[str, Any]) -> None:
    """Write the folder.

    Args:
        checkpoint: the pruned folder.
        target: the new folder.
        changed: trained tensors, by name.
        entry: entry for the list `retrained` of the record secateur.json.
    """
    # One tensor of all experts may be stored in pieces.
    stored = {piece: part for name, weight in changed.items() for piece, part in checkpoint.split(name, weight).items()}
    source = checkpoint.path
    with target as partial:
        writer = ShardWriter(partial, header_bytes=header_bytes_for(checkpoint.tensors))
        for name, info in checkpoint.tensors.items():
            writer.add(name, stored[name].to(info.dtype) if name in stored else checkpoint.read(name))
        writer.close()
        modeling = [MODELING_FILE] if is_per_layer(checkpoint.config) else []
        write_json(partial / "config.json", checkpoint.raw_config)
        for file in (*checkpoint.files, *modeling):
            copy_into(partial, file)
        record = read_record(source)
        record["retrained"] = [*record.get("retrained", []), entry]
        write_json(partial / RECORD, record)
        # A folder that another tool saved has no record, of which the model card is made.
        files = readme_and_report(read_text(source / BASE_CARD), lambda: record) if "sizes" in record else {}
        for name, contents in files.items():
            write_text_or_json(partial / name, contents)
