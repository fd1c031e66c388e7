"""`prune` with adaptive widths: the written model reaches its target, one survey serves many sizes, in every format."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from models import wide
from outputs import Notes, assert_error, record_of, weights_of
from secateur import Options, RunOptions, open_checkpoint, prune
from secateur.base.progress import Silent
from secateur.commands import survey_model as survey_step
from secateur.commands.sizes import sizes
from secateur.formats.gguf_export import export
from secateur.model.axes import Width

SMALL: dict[str, Any] = {"samples": 8, "length": 16, "calibration": "random"}


def taken(folder: Path) -> dict[str, float]:
    """Return the parameters and bytes of a stored model, and the bytes of its KV cache per token."""
    checkpoint = open_checkpoint(folder, trust_remote_code=True)
    tensors = checkpoint.tensors
    keys = [info for name, info in tensors.items() if name.endswith(("k_proj.weight", "v_proj.weight"))]
    return {
        "params": sum(info.entries for info in tensors.values()),
        "bytes": sum(info.bytes for info in tensors.values()),
        "kv": sum(info.shape[0] for info in keys) * checkpoint.dtype.itemsize,
    }


# Targets.


@pytest.mark.parametrize(("dtype", "widths"), [("float32", "uniform"), ("bfloat16", "adaptive")])
@pytest.mark.parametrize("target", ["params=75%", "params=45K", "bytes=75%", "kv=67%"])
def test_a_written_model_reaches_its_target(tmp_path, checkpoint_folder, target, dtype, widths):
    model = checkpoint_folder("llama")
    summary = prune(model, tmp_path / "out", target=target, dtype=dtype, widths=widths, recovery="none", **SMALL)
    name, _, amount = target.partition("=")
    found, dense = taken(tmp_path / "out"), taken(model)
    # The dense model as it would be in that dtype.
    halves = 2 if dtype == "bfloat16" and name != "params" else 1
    limit = float(amount[:-1]) / 100 * dense[name] / halves if amount.endswith("%") else 45_000
    assert found[name] <= limit
    if widths == "adaptive" and name != "kv":
        # No more goes than a channel or a group too much.
        assert found[name] > 0.97 * limit
    assert summary.parameters == (dense["params"], found["params"])
    assert summary.bytes == (dense["bytes"] // (2 if dtype == "bfloat16" else 1), found["bytes"])
    assert summary.cache_bytes[1] == found["kv"]
    assert record_of(tmp_path / "out")["options"]["target"] == target


def test_a_perplexity_target_limits_the_perplexity(tmp_path, checkpoint_folder):
    model = checkpoint_folder("llama")
    notes, shares = {}, {}
    for ratio in ("1.02", "1.2"):
        watcher = Notes()
        prune(model, tmp_path / ratio, target=f"ppl={ratio}x", watcher=watcher, **SMALL)
        notes[ratio] = [line for line in watcher.said if "times the dense perplexity on 16 held-out rows" in line]
        shares[ratio] = record_of(tmp_path / ratio)["sparsity"]["reached"]
        # The plan that was taken is one of those that were measured, and within.
        measured = [(float(line.split()[1].rstrip("%")), float(line.split()[3])) for line in notes[ratio]]
        chosen = [loss for gone, loss in measured if abs(gone - 100 * shares[ratio]) < 0.06]
        assert chosen
        assert min(chosen) <= float(ratio)
    assert 0 < shares["1.02"] < shares["1.2"]


# The choice.


def test_defaults_remove_a_quarter_with_adaptive_widths(tmp_path, checkpoint_folder):
    summary = prune(checkpoint_folder("llama"), tmp_path / "out", **SMALL)
    found = record_of(tmp_path / "out")
    assert (summary.format, summary.uniform) == ("hf", False)
    assert 0.25 <= summary.sparsity < 0.255
    assert found["cost"] > 0
    assert len({tuple(block["width"].values()) for block in found["blocks"]}) > 1
    assert summary.widths == {block["block"]: Width(block["width"]) for block in found["blocks"]}
    assert summary.pruned_widths() == list(summary.widths.values())
    assert (tmp_path / "out" / "modeling_secateur.py").is_file()


def test_widths_follow_a_ratio_file(tmp_path, checkpoint_folder):
    (tmp_path / "ratios.json").write_text('{"0:1": 0.5, "2:3": {"channels": 0.25}}')
    file = str(tmp_path / "ratios.json")
    summary = prune(checkpoint_folder("llama"), tmp_path / "out", widths=file, **SMALL)
    assert summary.widths == {0: wide(3, 1, 36), 2: wide(3, 2, 54)}
    assert summary.pruned_widths()[1] == wide(3, 2, 72)
    assert summary.format == "hf"


# One survey, many sizes.


def test_a_survey_file_is_reused(tmp_path, checkpoint_folder, calls_of):
    model, file, surveys = checkpoint_folder("llama"), tmp_path / "survey.json", calls_of(survey_step, "survey")
    prune(model, tmp_path / "kv", target="kv=50%", survey=file, **SMALL)
    prune(model, tmp_path / "uniform", widths="uniform", survey=file, **SMALL)
    prune(model, tmp_path / "half", sparsity=0.5, survey=file, **SMALL)
    assert len(surveys) == 1
    prune(model, tmp_path / "anew", sparsity=0.5, **SMALL)
    assert len(surveys) == 2
    assert weights_of(tmp_path / "half") == weights_of(tmp_path / "anew")


def test_a_survey_with_other_settings_is_refused(tmp_path, checkpoint_folder, calls_of):
    model, file, surveys = checkpoint_folder("llama"), tmp_path / "survey.json", calls_of(survey_step, "survey")
    prune(model, tmp_path / "out", survey=file, **SMALL)
    for change, message in (
        ({"criterion": "l1"}, "a survey with criterion surgeon instead of l1"),
        ({"ridge": 1.0}, "a survey with ridge 0.3 instead of 1.0"),
        ({"modules": ("heads",), "sparsity": 0.1}, "a survey with modules heads,channels instead of heads"),
        ({"blocks": "1:"}, "a survey with blocks 0:3 instead of 1:3"),
        ({"seed": 1}, "a survey of other calibration rows; use the same --calibration, --samples"),
        ({"samples": 40}, "a survey of other calibration rows; "),
    ):
        assert_error(message, prune, model, tmp_path / "other", survey=file, **SMALL | change)
    other = checkpoint_folder("mistral")
    assert_error("a survey of other weights", prune, other, tmp_path / "other", survey=file, **SMALL)
    assert not (tmp_path / "other").exists()
    assert len(surveys) == 1


def test_sizes_uses_one_survey_for_all_sizes(tmp_path, checkpoint_folder, calls_of):
    model, out, surveys = checkpoint_folder("llama"), tmp_path / "sizes", calls_of(survey_step, "survey")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * i % 116}" for i in range(400)))
    common = {"run_options": RunOptions(device="cpu"), "watcher": Silent()}
    options = [Options(sparsity=share, **SMALL) for share in (0.1, 0.5)]
    wrong = [Options(sparsity=0.9999, **SMALL), *options]
    assert_error(r"sparsity 100\.0% is out of reach", sizes, model, out, wrong, texts=[], tokens=None, **common)
    assert not out.exists()
    assert not surveys
    found = sizes(model, out, options, texts=[str(text)], tokens=256, **common)
    assert len(surveys) == 1
    assert [size.folder for size in found] == [str(model), str(out / "sparsity-0.1"), str(out / "sparsity-0.5")]
    for size in found:
        held = taken(Path(size.folder))
        assert (size.parameters, size.bytes) == (held["params"], held["bytes"])
        assert size.perplexity[str(text)] > 1
    stored = json.loads((out / "sizes.json").read_text())
    assert [size["parameters"] for size in stored] == [size.parameters for size in found]
    # The same models as one by one.
    prune(model, tmp_path / "alone", sparsity=0.5, **SMALL)
    assert weights_of(tmp_path / "alone") == weights_of(out / "sparsity-0.5")


# GGUF.


@pytest.mark.parametrize(("type", "wishes"), [("f16", {"sparsity": 0.3}), ("q8_0", {"target": "bytes=60%"})])
def test_gguf_output_equals_the_export_of_a_folder(tmp_path, letters_folder, type, wishes):
    model = letters_folder("llama")
    summary = prune(model, tmp_path / "out.gguf", format="gguf", type=type, **wishes, **SMALL)
    assert [file.name for file in tmp_path.iterdir()] == ["out.gguf"]
    held = sum(int(tensor.n_bytes) for tensor in GGUFReader(tmp_path / "out.gguf").tensors)
    assert (summary.format, summary.bytes[1]) == ("gguf", held)
    if "target" in wishes:
        assert held <= 0.6 * summary.bytes[0]
        return
    prune(model, tmp_path / "folder", **wishes, **SMALL)
    assert record_of(tmp_path / "folder")["sparsity"]["reached"] == summary.sparsity
    export(tmp_path / "folder", tmp_path / "again.gguf", type=type)
    found, again = (GGUFReader(tmp_path / name).tensors for name in ("out.gguf", "again.gguf"))
    for one, two in zip(again, found, strict=True):
        assert one.name == two.name
        assert (one.data == two.data).all()


def test_gguf_holds_one_width_from_a_ratio_file(tmp_path, letters_folder):
    (tmp_path / "ratios.json").write_text('{"0:3": {"channels": 0.25}}')
    how = {"format": "gguf", "widths": str(tmp_path / "ratios.json")}
    assert prune(letters_folder("gpt2"), tmp_path / "out.gguf", **how, **SMALL).uniform
    assert len(GGUFReader(tmp_path / "out.gguf").tensors) > 30


def test_the_final_norm_is_scaled_as_recorded(tmp_path, checkpoint_folder):
    model = checkpoint_folder("llama")
    dense = load_file(model / "model.safetensors")["model.norm.weight"]
    for recovery in ("refit", "none"):
        prune(model, tmp_path / recovery, recovery=recovery, sparsity=0.5, **{**SMALL, "samples": 40})
        scale = record_of(tmp_path / recovery)["final_norm_scale"]
        assert (scale == 1) == (recovery == "none")
        written = load_file(tmp_path / recovery / "model.safetensors")["model.norm.weight"]
        torch.testing.assert_close(written, dense * scale)


@pytest.mark.parametrize(("name", "said"), [("gemma3_text", 1), ("llama", 0)])
def test_no_bias_is_fitted_before_a_norm(name, said, tmp_path, checkpoint_folder):
    how, notes = SMALL | {"sparsity": 0.3, "recovery": "bias", "format": "hf"}, Notes()
    prune(checkpoint_folder(name), tmp_path / "out", **how, watcher=notes)
    assert sum(line.startswith("No bias is fitted: this model has a norm after") for line in notes.said) == said
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert any("down_proj.bias" in one for one in names) == (not said)


def test_a_model_of_zeros_has_no_error(tmp_path, checkpoint_folder):
    model = tmp_path / "model"
    shutil.copytree(checkpoint_folder("llama"), model)
    weights = {name: torch.zeros_like(tensor) for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    prune(model, tmp_path / "out", sparsity=0.3, **SMALL, format="hf")
    modules = [module for block in record_of(tmp_path / "out")["blocks"] for module in block["modules"]]
    assert {module["error"] for module in modules} == {0.0}
