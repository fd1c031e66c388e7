"""`prune` with adaptive widths: the written model reaches its target, and one survey serves equal settings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models import wide
from outputs import Notes, assert_error, record_of
from secateur import open_checkpoint, prune
from secateur.steps import survey_model as survey_step

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


def test_widths_follow_a_ratio_file(tmp_path, checkpoint_folder):
    (tmp_path / "ratios.json").write_text('{"0:1": 0.5, "2:3": {"channels": 0.25}}')
    file = str(tmp_path / "ratios.json")
    summary = prune(checkpoint_folder("llama"), tmp_path / "out", widths=file, **SMALL)
    assert summary.widths == {0: wide(3, 1, 36), 2: wide(3, 2, 54)}
    assert summary.pruned_widths()[1] == wide(3, 2, 72)
    assert summary.format == "hf"


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


def test_the_final_norm_is_scaled_as_recorded(tmp_path, checkpoint_folder):
    model = checkpoint_folder("llama")
    dense = load_file(model / "model.safetensors")["model.norm.weight"]
    for recovery in ("refit", "none"):
        prune(model, tmp_path / recovery, recovery=recovery, sparsity=0.5, **{**SMALL, "samples": 40})
        scale = record_of(tmp_path / recovery)["final_norm_scale"]
        assert (scale == 1) == (recovery == "none")
        written = load_file(tmp_path / recovery / "model.safetensors")["model.norm.weight"]
        torch.testing.assert_close(written, dense * scale)
