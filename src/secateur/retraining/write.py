"""Retrained folder: a copy of the pruned folder with the trained weights."""

from typing import Any

from secateur.base.output import Output
from secateur.formats.per_layer import MODELING_FILE
from secateur.model.checkpoint import Checkpoint
from secateur.model.per_layer import is_per_layer
from secateur.report.folder import readme_and_report
from secateur.retraining.trained_weights import TrainedWeights
from secateur.write.files import copy_into, write_json, write_text_or_json
from secateur.write.record import MAP_FILE, RECORD, read_record
from secateur.write.shards import ShardWriter, header_bytes_for


def write_retrained(
    checkpoint: Checkpoint, target: Output, weights: TrainedWeights, entry: dict[str, Any], command: str
) -> None:
    """Write the folder.

    Args:
        checkpoint: The pruned folder.
        target: The new folder.
        weights: The trained tensors.
        entry: Entry for the list `retrained` of the record secateur.json.
        command: The command of the training.
    """
    source = checkpoint.path
    with target as partial:
        writer = ShardWriter(partial, header_bytes=header_bytes_for(checkpoint.tensors))
        for name in checkpoint.tensors:
            writer.add(name, weights[name] if name in weights else checkpoint.read(name))
        writer.close()
        more = [MODELING_FILE] if is_per_layer(checkpoint.config) else []
        more += [file for file in [source / MAP_FILE] if file.is_file()]
        write_json(partial / "config.json", checkpoint.raw_config)
        for file in (*checkpoint.files, *more):
            copy_into(partial, file)
        record = read_record(source)
        record["retrained"] = [*record.get("retrained", []), entry]
        record["later"] = [*record.get("later", []), command]
        write_json(partial / RECORD, record)
        # A folder that another tool saved has no record, of which the model card is made.
        files = readme_and_report(source, lambda: record) if "sizes" in record else {}
        for name, contents in files.items():
            write_text_or_json(partial / name, contents)
