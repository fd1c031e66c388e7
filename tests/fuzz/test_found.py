"""Inputs that fuzz cases have found to fail, each as a test of its own."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from bench import BIOGPT, NEVER, SMALL, Bench, known
from mutate import spelled
from recipes import RECIPES

from secateur import SecateurError, prune
from secateur.formats.gguf_export import export
from secateur.model.checkpoint import open_checkpoint
from secateur.paper.recipe import read_recipe
from secateur.text.calibration import calibration_rows


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("found"))


def edited(folder: Path, file: str, **keys: Any) -> None:
    path = folder / file
    path.write_text(spelled(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize("number", range(len(RECIPES)))
def test_invalid_recipes_are_refused(tmp_path: Path, number: int) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPES[number])
    with pytest.raises(SecateurError, match=r"recipe\.yaml"):
        read_recipe(str(file))


ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "two layers in one": ({"gate": "fc1"}, "fc1.weight, which stands for two layers"),
    "both levels in one": ({"down": "fc1"}, "fc1.weight, which stands for two layers"),
    "the block itself": ({"gate": ""}, "which is no tensor of a block"),
    "a key that is not there": (
        {"stock": {"head_counts": "dense"}},
        "no rope_parameters, so stock.theta_key must be null",
    ),
    "a key that only some blocks get": ({"ungrouped": False}, "no num_key_value_heads, so ungrouped must be true"),
    "another key of the width": (
        {"stock": {"head_counts": "dense", "theta_key": None, "channels_key": "inner"}},
        r"fc1.weight is .36, 48., but config.json makes it .72, 48. .and 8 more.",
    ),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_a_family_file_that_does_not_fit_the_model_is_refused(tmp_path: Path, bench: Bench, case: str) -> None:
    keys, said = ENTRIES[case]
    file = tmp_path / "family.yaml"
    model = bench.biogpt
    file.write_text(json.dumps(BIOGPT | keys))
    with known("biogpt"), pytest.raises(SecateurError, match=said):
        prune(model, tmp_path / "out", **SMALL, family=file, widths="uniform")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"attention_dropout": -0.1}, "attention_dropout is -0.1, not a number between"),
        ({"num_attention_heads": -4}, "num_attention_heads is -4, not a whole number"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "auto"}}, "cannot make a model of config.json"),
    ],
)
def test_impossible_configs_are_refused(tmp_path: Path, bench: Bench, keys: dict[str, Any], said: str) -> None:
    folder = shutil.copytree(bench.tiny, tmp_path / "in")
    edited(folder, "config.json", **keys)
    with pytest.raises(SecateurError, match=said):
        prune(folder, tmp_path / "out", **SMALL)


def test_a_block_that_transformers_cannot_run_is_refused(tmp_path: Path, bench: Bench) -> None:
    folder = shutil.copytree(bench.dense("phi3"), tmp_path / "in")
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    edited(folder, "config.json", rope_parameters=rope | {"partial_rotary_factor": 7})
    with pytest.raises(SecateurError, match=r"config.json \(RuntimeError: The size of tensor"):
        prune(folder, tmp_path / "out", **SMALL)


def test_a_number_of_experts_under_another_key_is_checked(tmp_path: Path, bench: Bench) -> None:
    folder = shutil.copytree(bench.dense("qwen3_moe"), tmp_path / "in")
    edited(folder, "config.json", num_local_experts=float("-inf"))
    with pytest.raises(SecateurError, match="num_experts is -inf, not a whole number"):
        open_checkpoint(folder)


def test_a_wrong_tie_word_embeddings_is_corrected(tmp_path: Path, bench: Bench) -> None:
    folder = shutil.copytree(bench.tiny, tmp_path / "in")
    edited(folder, "config.json", tie_word_embeddings=True)
    for out in (folder, bench.tiny):
        prune(out, tmp_path / f"{out.name}-out", **SMALL)
    written = tmp_path / "in-out"
    assert json.loads((written / "config.json").read_text())["tie_word_embeddings"] is False
    same = tmp_path / f"{bench.tiny.name}-out"
    assert (written / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()


def test_an_unknown_class_is_refused(tmp_path: Path, bench: Bench) -> None:
    folder = shutil.copytree(bench.pruned("adaptive"), tmp_path / "in")
    edited(folder, "config.json", architectures=["SecateurLlamaForCausal"])
    with pytest.raises(SecateurError, match="names the class SecateurLlamaForCausal, which does not exist"):
        export(folder, tmp_path / "out.gguf")


def test_invalid_generation_settings_are_refused(tmp_path: Path, bench: Bench) -> None:
    folder = shutil.copytree(bench.tiny, tmp_path / "in")
    edited(folder, "generation_config.json", pad_token_id=[-1])
    with pytest.raises(SecateurError, match=r"generation_config.json: transformers rejects it"):
        open_checkpoint(folder)


def test_a_shard_with_too_long_a_name_is_refused(tmp_path: Path, bench: Bench) -> None:
    folder = shutil.copytree(bench.shards, tmp_path / "in")
    edited(folder, "model.safetensors.index.json", weight_map={"a": "é" * 200})
    with pytest.raises(SecateurError, match="is missing from the folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize("case", ["metadata", "hole"])
def test_headers_that_the_library_refuses(tmp_path: Path, bench: Bench, case: str) -> None:
    file = shutil.copytree(bench.tiny, tmp_path / "in") / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    if case == "metadata":
        header["__metadata__"] = {"format": 1}
    else:
        for one in header.values():
            if "data_offsets" in one:
                one["data_offsets"] = [place + 8 for place in one["data_offsets"]]
        rest = bytes(8) + rest
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + rest)
    with pytest.raises(SecateurError, match="header broken"):
        open_checkpoint(file.parent)


@pytest.mark.parametrize(
    "keys", [{"left_after_refit": float("nan")}, {"kind": ["heads"]}, {"errors": [True]}, {"energy": "1"}]
)
def test_invalid_surveys_are_refused(tmp_path: Path, bench: Bench, keys: dict[str, Any]) -> None:
    file, raw = tmp_path / "survey.json", json.loads(bench.survey.read_text())
    raw["curves"][0] |= keys
    file.write_text(json.dumps(raw))
    with pytest.raises(SecateurError, match=r"survey.json: not a survey by secateur"):
        prune(bench.tiny, tmp_path / "out", **SMALL, survey=file)


def test_a_tokenizer_that_panics_is_an_error_in_one_line(tmp_path: Path, bench: Bench) -> None:
    """The template names a missing token, which the tokenizers library notices only when it encodes."""
    folder = shutil.copytree(bench.tiny, tmp_path / "in")
    single = [{"SpecialToken": {"id": "<x>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {}}
    edited(folder, "tokenizer.json", post_processor=template)
    how: dict[str, Any] = {"samples": 4, "length": 8, "seed": 0, "vocab_size": 128}
    with pytest.raises(SecateurError, match="tokenizer"):
        calibration_rows(open_checkpoint(folder).tokenizer(), str(bench.text), **how)


def test_an_export_of_a_folder_with_wrong_sizes_is_refused(tmp_path: Path, bench: Bench) -> None:
    folder = shutil.copytree(bench.pruned("uniform"), tmp_path / "in")
    edited(folder, "config.json", vocab_size=127)
    with pytest.raises(SecateurError, match=r"is \[128, 16\], but config.json makes it \[127, 16\]"):
        export(folder, tmp_path / "out.gguf")


def test_a_damaged_shard_of_a_stopped_run_is_written_again(tmp_path: Path, bench: Bench) -> None:
    state = shutil.copytree(bench.stopped(5), tmp_path / ".out.run")
    (shard,) = state.glob("model/.shard-*")
    shard.write_bytes(b"\xff" * 4096 + shard.read_bytes()[4096:])
    prune(bench.tiny, tmp_path / "out", **SMALL)
    bench.stopped(NEVER)
    whole = bench.place / f"stopped-{NEVER}" / "model.safetensors"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole.read_bytes()


def test_half_a_surrogate_pair_in_a_config_is_kept(tmp_path: Path, bench: Bench) -> None:
    folder = shutil.copytree(bench.tiny, tmp_path / "in")
    config = json.loads((folder / "config.json").read_text()) | {"note": "a\ud800"}
    (folder / "config.json").write_text(json.dumps(config))
    prune(folder, tmp_path / "out", **SMALL)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["note"] == "a\ud800"
