"""`trim`: write a folder with fewer tokens in its vocabulary; nothing else of the model changes."""

from pathlib import Path
from typing import Any

import secateur
from secateur.base.device import pick_device
from secateur.base.errors import SecateurError
from secateur.base.files import existing_path
from secateur.base.options import changed_options, option_specs
from secateur.base.output import Output
from secateur.base.progress import Silent, Watcher, busy_reading
from secateur.base.services import Services
from secateur.commands.options import Options, RunOptions, with_settings
from secateur.commands.vocabulary import KeptVocabulary, with_vocabulary
from secateur.formats.folder import format_of_folder
from secateur.formats.opened import check_written
from secateur.model.checkpoint import Checkpoint, open_checkpoint
from secateur.model.per_layer import empty_decoder
from secateur.report.card import BASE_CARD, CARD
from secateur.report.folder import check_record, read_text, readme_and_report
from secateur.report.summary import Trimmed
from secateur.text.calibration import check_calibration
from secateur.vocabulary.map_file import MAP_FILE, map_contents, original_ids
from secateur.vocabulary.wanted import parse_vocabulary
from secateur.write.files import copy_into, write_json, write_text_or_json
from secateur.write.record import RECORD, read_record, tokens_kept
from secateur.write.shards import ShardWriter, header_bytes_for

USED = ("vocabulary", "calibration", "length")
"""Options that decide the result."""
RUN_USED = ("device", "revision", "overwrite", "trust_remote_code")
"""Options that do not decide the result, but have an effect."""


def trim(
    model: str | Path,
    out: str | Path,
    options: Options | None = None,
    run_options: RunOptions | None = None,
    *,
    watcher: Watcher | None = None,
    **settings: Any,
) -> Trimmed:
    """Write a folder with fewer tokens in its vocabulary.

    Args:
        model: A folder, also one that secateur wrote, a .gguf file or a Hugging Face Hub id.
        out: The new folder; it appears complete or not at all.
        options: Options; only `vocabulary`, `calibration` and `length` are used.
        run_options: Device, revision, and whether to replace an existing folder.
        watcher: Receives progress and notes.
        settings: Fields of the two by name: `vocabulary="latin"`, ...

    Raises:
        SecateurError: The vocabulary has no such tokens, the tokenizer cannot be cut, or the folder cannot be written.
    """
    options, run_options = with_settings(options, run_options, settings)
    services, device = Services(watcher=watcher or Silent()), pick_device(run_options.device)
    _check_names(options, run_options)
    _check(options, out)
    with busy_reading(services.watcher, "Opening", str(model)):
        checkpoint = open_checkpoint(
            model, revision=run_options.revision, trust_remote_code=run_options.trust_remote_code
        )
    _check_folder(checkpoint)
    source = existing_path(model) or checkpoint.path
    Output(Path(out), overwrite=run_options.overwrite, source=source).check()
    cut, vocabulary = with_vocabulary(checkpoint, options, device, services)
    if vocabulary is None:
        raise SecateurError(f"{model}: --vocabulary {options.vocabulary} keeps all tokens, so there is nothing to trim")
    target = Output(Path(out), overwrite=run_options.overwrite, source=source, expected_bytes=cut.bytes)
    with target as folder:
        _write(cut, vocabulary, folder, services.watcher)
        check_written(folder, target.path, "report this as a bug in secateur")
    loading = format_of_folder(checkpoint.path).how_to_load(checkpoint.auto_class.__name__, str(out))
    return Trimmed(
        str(target.path),
        vocabulary.tokens,
        (_parameters(checkpoint), _parameters(cut)),
        (checkpoint.bytes, cut.bytes),
        vocabulary.bits_per_byte,
        loading.line,
    )


def _check_names(options: Options, run_options: RunOptions) -> None:
    """Raise `SecateurError` for an option that has no effect here."""
    for given, used in ((options, USED), (run_options, RUN_USED)):
        others = changed_options(given, [name for name in option_specs(type(given)) if name not in used])
        if others:
            raise SecateurError(f"{next(iter(others))} has no effect on trim, which only removes tokens; leave it out")


def _check(options: Options, out: str | Path) -> None:
    """Check what can be checked without the model.

    Raises:
        SecateurError: No tokens are to be cut, the text cannot be read, or the output is not a folder.
    """
    wanted = parse_vocabulary(options.vocabulary)
    if wanted is None:
        raise SecateurError("--vocabulary is all, which cuts no tokens; name scripts, such as --vocabulary latin")
    if wanted.reads_text:
        check_calibration(options.calibration, length=options.length)
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


def _write(cut: Checkpoint, vocabulary: KeptVocabulary, folder: Path, watcher: Watcher) -> None:
    """Write weights, config, tokenizer and records into a folder that exists."""
    writer = ShardWriter(folder, header_bytes=header_bytes_for(cut.tensors))
    for name in watcher.track(list(cut.weights), "Write"):
        writer.add(name, cut.tensors[name].as_stored(cut.read(name)))
    writer.close()
    # This also corrects what config.json says about tied tensors.
    cut.check_shapes(empty_decoder(cut))
    write_json(folder / "config.json", cut.whole_config)
    for file in (*cut.files, *format_of_folder(cut.path).code):
        copy_into(folder, file)
    ids = original_ids(cut) or []
    (folder / MAP_FILE).write_text(map_contents(ids), encoding="utf-8")
    for name, contents in _records(cut, vocabulary).items():
        write_text_or_json(folder / name, contents)


def _records(cut: Checkpoint, vocabulary: KeptVocabulary) -> dict[str, Any]:
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
    return {RECORD: record} | readme_and_report(read_text(cut.path / BASE_CARD), lambda: record)
