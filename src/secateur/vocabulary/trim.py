"""`trim`: write a folder with fewer tokens in its vocabulary; nothing else of the model changes."""

from pathlib import Path
from typing import Any

import secateur
from secateur.base.device import pick_device
from secateur.base.errors import SecateurError
from secateur.base.files import existing_path
from secateur.base.options import command_line
from secateur.base.output import Output
from secateur.base.progress import Silent, Watcher, busy_reading
from secateur.base.services import Services
from secateur.checkpoints.checkpoint import Checkpoint, open_checkpoint
from secateur.formats.folder import format_of_folder
from secateur.formats.opened import check_written
from secateur.model.per_layer import empty_decoder
from secateur.report.card import CARD
from secateur.report.folder import check_record, read_text, readme_and_report
from secateur.report.summary import Trimmed
from secateur.text.calibration import check_calibration
from secateur.text.sources import GENERAL
from secateur.vocabulary.choose import KeptVocabulary, with_vocabulary
from secateur.vocabulary.kept import map_contents, original_ids
from secateur.vocabulary.wanted import parse_vocabulary
from secateur.write.files import copy_into, write_json, write_text_or_json
from secateur.write.record import MAP_FILE, RECORD, read_record, tokens_kept
from secateur.write.shards import ShardWriter, header_bytes_for

LENGTH = 128
"""Default number of tokens in each row on which the cost of the cut is measured."""


def trim(
    model: str | Path,
    out: str | Path,
    *,
    vocabulary: str,
    calibration: str | Path = GENERAL,
    length: int = LENGTH,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    watcher: Watcher | None = None,
) -> Trimmed:
    """Write a folder with fewer tokens in its vocabulary.

    Args:
        model: A folder, also one that secateur wrote, a .gguf file or a Hugging Face Hub id.
        out: The new folder; it appears complete or not at all.
        vocabulary: Tokens to keep, as in `--vocabulary`: `"latin"`, `"text"`, `"64k"`, ...
        calibration: Text whose tokens are counted.
        length: Tokens in each row on which the cost of the cut is measured.
        device: Device on which the cost is measured.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Run Python code from the model's folder.
        overwrite: Replace an existing folder.
        watcher: Receives progress and notes.

    Raises:
        SecateurError: The vocabulary has no such tokens, the tokenizer cannot be cut, or the folder cannot be written.
    """
    services, on, calibration = Services(watcher=watcher or Silent()), pick_device(device), str(calibration)
    _check(vocabulary, calibration, length, out)
    with busy_reading(services.watcher, "Opening", str(model)):
        checkpoint = open_checkpoint(model, revision=revision, trust_remote_code=trust_remote_code)
    _check_folder(checkpoint)
    source = existing_path(model) or checkpoint.path
    Output(Path(out), overwrite=overwrite, source=source).check()
    cut, kept = with_vocabulary(
        checkpoint, vocabulary, calibration=calibration, length=length, device=on, services=services
    )
    if kept is None:
        raise SecateurError(f"{model}: --vocabulary {vocabulary} keeps all tokens, so there is nothing to trim")
    target = Output(Path(out), overwrite=overwrite, source=source, expected_bytes=cut.bytes)
    with target as folder:
        given = {"vocabulary": vocabulary}
        given |= {} if calibration == GENERAL else {"calibration": calibration}
        given |= {} if length == LENGTH else {"length": str(length)}
        _write(cut, kept, command_line("trim", checkpoint.source, given), folder, services.watcher)
        check_written(folder, target.path, "report this as a bug in secateur", checkpoint.trust_remote_code)
    loading = format_of_folder(checkpoint.path).how_to_load(checkpoint.auto_class.__name__, str(out))
    return Trimmed(
        str(target.path),
        kept.tokens,
        (_parameters(checkpoint), _parameters(cut)),
        (checkpoint.bytes, cut.bytes),
        kept.bits_per_byte,
        loading.line,
    )


def _check(vocabulary: str, calibration: str, length: int, out: str | Path) -> None:
    """Check what can be checked without the model.

    Raises:
        SecateurError: No tokens are to be cut, the text cannot be read, or the output is not a folder.
    """
    wanted = parse_vocabulary(vocabulary)
    if wanted is None:
        raise SecateurError("--vocabulary is all, which cuts no tokens; name scripts, such as --vocabulary latin")
    # Scripts need no text.
    check_calibration(GENERAL if wanted.scripts else calibration, length=length)
    if Path(out).suffix == ".gguf":
        raise SecateurError(f"{out}: trim writes a folder; name one, then convert it with secateur export")


def _check_folder(checkpoint: Checkpoint) -> None:
    """Check the tokenizer, and what an earlier run has written next to the weights.

    Raises:
        SecateurError: The tokenizer does not load, or the record or the map of token ids is damaged.
    """
    checkpoint.tokenizer()
    original_ids(checkpoint)
    if "sizes" in read_record(checkpoint.path):
        check_record(checkpoint.path)


def _parameters(checkpoint: Checkpoint) -> int:
    """Return the number of parameters, to which stored buffers do not belong."""
    buffers = checkpoint.buffers_of(empty_decoder(checkpoint))
    return sum(info.entries for name, info in checkpoint.weights.items() if name not in buffers)


def _write(cut: Checkpoint, vocabulary: KeptVocabulary, command: str, folder: Path, watcher: Watcher) -> None:
    """Write weights, config, tokenizer and records into a folder that exists."""
    writer = ShardWriter(folder, header_bytes=header_bytes_for(cut.tensors))
    for name in watcher.track(list(cut.weights), "Write"):
        writer.add(name, cut.tensors[name].as_stored(cut.read(name)))
    writer.close()
    # This also corrects what config.json says about tied tensors.
    cut.check_shapes(empty_decoder(cut))
    write_json(folder / "config.json", cut.whole_config)
    for file in (*cut.files, *(cut.path / one.name for one in format_of_folder(cut.path).code)):
        copy_into(folder, file)
    ids = original_ids(cut) or []
    (folder / MAP_FILE).write_text(map_contents(ids), encoding="utf-8")
    for name, contents in _records(cut, vocabulary, command).items():
        write_text_or_json(folder / name, contents)


def _records(cut: Checkpoint, vocabulary: KeptVocabulary, command: str) -> dict[str, Any]:
    """Return the contents of secateur.json and of the model card by file name, of the folder of a pruned model too."""
    earlier, entry = read_record(cut.path), vocabulary.as_record()
    if (first := tokens_kept(earlier)) is not None:
        # The text of the earlier cut may have been another one, so that its bits per byte cannot be compared.
        parameters = earlier["vocabulary"].get("parameters", 0) + vocabulary.parameters
        entry |= {"tokens": (first[0], vocabulary.tokens[1]), "parameters": parameters, "bits_per_byte": None}
    record = {"secateur": secateur.__version__, "model": cut.source} | earlier | {"vocabulary": entry}
    if "sizes" not in earlier:
        card = read_text(cut.path / CARD)
        return {RECORD: record} | ({} if card is None else {CARD: card})
    now = {"parameters": _parameters(cut), "bytes": cut.bytes}
    sizes = {name: (before, now.get(name, after)) for name, (before, after) in earlier["sizes"].items()}
    record["sizes"] = sizes | {"vocabulary": entry["tokens"]}
    record["later"] = [*earlier.get("later", []), command]
    return {RECORD: record} | readme_and_report(cut.path, lambda: record)
