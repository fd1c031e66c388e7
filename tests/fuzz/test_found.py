"""Inputs that fuzz cases have found to fail, each as a test of its own."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from bench import BIOGPT, NEVER, SMALL, Bench
from mutate import FAMILY_FILES, spelled

from outputs import assert_error, weights_of
from secateur import calibration_rows, open_checkpoint, prune
from secateur.families.registry import FAMILIES
from secateur.gguf.export import export
from secateur.steps.family_file import read_family


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("found"))


def edited(source: Path, folder: Path, file: str, **keys: Any) -> Path:
    """Copy a folder, and change keys of one of its JSON files."""
    path = Path(shutil.copytree(source, folder)) / file
    path.write_text(spelled(json.loads(path.read_text()) | keys))
    return folder


@pytest.mark.parametrize("number", range(len(FAMILY_FILES)))
def test_invalid_family_files_are_refused(tmp_path, number):
    (tmp_path / "family.yaml").write_text(FAMILY_FILES[number])
    assert_error(r"family\.yaml", read_family, tmp_path / "family.yaml")


ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "two layers in one": ({"gate": "fc1"}, "fc1.weight, which stands for two layers"),
    "the block itself": ({"gate": ""}, "which is no tensor of a block"),
    "another key of the width": ({"channels_key": "inner"}, r"fc1.weight is .36, 48., but config.j"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_a_family_file_that_does_not_fit_the_model_is_refused(tmp_path, bench, case):
    keys, said = ENTRIES[case]
    model, file = bench.biogpt, tmp_path / "family.yaml"
    file.write_text(json.dumps(BIOGPT | keys))
    with patch.dict(FAMILIES):
        assert_error(said, prune, model, tmp_path / "out", **SMALL, family=file, widths="uniform")
    assert not (tmp_path / "out").exists()


def encode(folder: Path) -> None:
    text = folder.with_suffix(".txt")
    text.write_text("w1 w2 " * 60)
    calibration_rows(open_checkpoint(folder).tokenizer(), str(text), samples=4, length=8, seed=0, vocab_size=128)


def prune_it(folder: Path) -> None:
    prune(folder, folder.with_name("out"), **SMALL)


def export_it(folder: Path) -> None:
    export(folder, folder.with_name("out.gguf"))


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CONFIG, GENERATION, INDEX = "config.json", "generation_config.json", "model.safetensors.index.json"
# The template names a missing token, which the tokenizers library notices only when it encodes.
SINGLE = [{"SpecialToken": {"id": "<x>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
TEMPLATE = {"type": "TemplateProcessing", "single": SINGLE, "pair": SINGLE, "special_tokens": {}}
EDITS: list[tuple[str, str, dict[str, Any], Callable[[Path], Any], str]] = [
    ("tiny", CONFIG, {"attention_dropout": -0.1}, prune_it, "attention_dropout is -0.1, not a number between"),
    ("tiny", CONFIG, {"num_attention_heads": -4}, prune_it, "num_attention_heads is -4, not a whole number"),
    ("tiny", CONFIG, {"hidden_size": 2**40}, prune_it, "hidden_size is 1,099,511,627,776, more than 16,777,216; corr"),
    ("tiny", CONFIG, {"num_hidden_layers": 2**40}, prune_it, "num_hidden_layers is 1,099,511,627,776, more than 16,"),
    ("qwen3_moe", CONFIG, {"num_local_experts": 2**20}, open_checkpoint, "num_local_experts is 1,048,576, more than"),
    ("tiny", CONFIG, {"rope_parameters": ROPE | {"rope_theta": "auto"}}, prune_it, "cannot make a model of config.j"),
    ("phi3", CONFIG, {"rope_parameters": ROPE | {"partial_rotary_factor": 7}}, prune_it, "Error: The size of tensor"),
    ("qwen3_moe", CONFIG, {"num_local_experts": float("-inf")}, open_checkpoint, "num_experts is -inf, not a whole"),
    ("tiny", GENERATION, {"pad_token_id": [-1]}, open_checkpoint, r"generation_config.json: transformers rejects it"),
    ("shards", INDEX, {"weight_map": {"a": "é" * 200}}, open_checkpoint, "is missing from the folder"),
    ("tiny", "tokenizer.json", {"post_processor": TEMPLATE}, encode, "tokenizer"),
    ("adaptive", CONFIG, {"architectures": ["SecateurLlama"]}, export_it, "class SecateurLlama, which does not exist"),
    ("uniform", CONFIG, {"vocab_size": 127}, export_it, r"is \[128, 16\], but config.json makes it \[127, 16\]"),
]


@pytest.mark.parametrize(("source", "file", "keys", "act", "said"), EDITS)
def test_an_edited_file_is_refused(tmp_path, bench, source, file, keys, act, said):
    made = bench.pruned if source in ("adaptive", "uniform") else bench.dense
    folder = getattr(bench, source) if source in ("tiny", "shards") else made(source)
    assert_error(said, act, edited(folder, tmp_path / "in", file, **keys))


def test_a_wrong_tie_word_embeddings_is_corrected(tmp_path, bench):
    folder = edited(bench.tiny, tmp_path / "in", CONFIG, tie_word_embeddings=True)
    for source, out in ((folder, "out"), (bench.tiny, "wanted")):
        prune(source, tmp_path / out, **SMALL)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["tie_word_embeddings"] is False
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "wanted")


@pytest.mark.parametrize("case", ["metadata", "hole"])
def test_headers_that_the_library_refuses(tmp_path, bench, case):
    file = shutil.copytree(bench.tiny, tmp_path / "in") / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    if case == "metadata":
        header["__metadata__"] = {"format": 1}
    else:
        rest = bytes(8) + rest
        for one in header.values():
            one |= {"data_offsets": [place + 8 for place in one["data_offsets"]]} if "data_offsets" in one else {}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + rest)
    assert_error("header broken", open_checkpoint, file.parent)


def test_a_damaged_shard_of_a_stopped_run_is_written_again(tmp_path, bench):
    state = shutil.copytree(bench.stopped(5), tmp_path / ".out.run")
    (shard,) = state.glob("model/.shard-*")
    shard.write_bytes(b"\xff" * 4096 + shard.read_bytes()[4096:])
    prune(bench.tiny, tmp_path / "out", **SMALL)
    bench.stopped(NEVER)
    assert weights_of(tmp_path / "out") == weights_of(bench.place / f"stopped-{NEVER}")


def test_half_a_surrogate_pair_in_a_config_is_kept(tmp_path, bench):
    prune(edited(bench.tiny, tmp_path / "in", CONFIG, note="a\ud800"), tmp_path / "out", **SMALL)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["note"] == "a\ud800"
