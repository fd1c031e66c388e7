"""The files of a written folder, and outputs that are refused."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoConfig

import secateur.formats.per_layer as writing
from models import SIZES
from outputs import assert_error, edited_weights
from secateur import BlockStream, prune
from secateur.families.registry import FAMILIES

# Three quarters of its heads do not divide its hidden size.
MORE_ROWS = {"arcee 8 heads": lambda: AutoConfig.for_model("arcee", **SIZES | WIDE)}
WIDE = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
SMALL: dict[str, Any] = {"calibration": "random", "samples": 4, "length": 8, "device": "cpu", "effort": "quick"}


@pytest.mark.parametrize("asked", [{"dtype": "float16"}, {"format": "gguf", "type": "f16", "widths": "uniform"}])
def test_weights_too_large_for_float16_are_refused_early(tmp_path, checkpoint_folder, monkeypatch, asked):
    model = shutil.copytree(checkpoint_folder("llama"), tmp_path / "dense")
    with edited_weights(model) as tensors:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = -1e5
    monkeypatch.setattr(BlockStream, "embed", lambda *_: pytest.fail("work has begun"))
    out = tmp_path / ("out.gguf" if "type" in asked else "out")
    said = r"1.mlp.up_proj.weight holds 100,000, but float16 goes only to 65,504"
    assert_error(said, prune, model, out, **SMALL | asked)
    with pytest.raises(pytest.fail.Exception, match="work has begun"):
        prune(model, tmp_path / "wide", **SMALL, dtype="bfloat16")


def test_a_folder_that_the_stock_class_refuses_never_appears(tmp_path, checkpoint_folder, monkeypatch):
    asked = SMALL | {"widths": "uniform", "target": "kv=75%", "modules": ("heads",)}
    model = checkpoint_folder("arcee 8 heads")
    found = prune(model, tmp_path / "right", **asked)
    assert {width.kv_groups for width in found.widths.values()} == {2}
    shutil.rmtree(tmp_path / "right")
    monkeypatch.setitem(FAMILIES, "arcee", replace(FAMILIES["arcee"], stated={"head_counts": "any"}))
    said = r"out: transformers cannot open the written model, so it was deleted \(config.json: .*heads \(6\).*; use"
    assert_error(said, prune, model, tmp_path / "out", **asked)
    assert not list(tmp_path.iterdir())


def blocks_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    return list(config["per_layer_config"].values())


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a width": (
        lambda config: [own.update(intermediate_size=own["intermediate_size"] + 1) for own in blocks_of(config)],
        r"gate_proj.weight is \[\d+, 48\], but config.json makes it \[\d+, 48\] \(and 8 more\)",
    ),
    "layers": (
        lambda config: config.update(num_hidden_layers=config["num_hidden_layers"] + 1),
        r"tensors missing from the weights: model.layers.3",
    ),
    "a bias": (
        lambda config: [own.pop("feed_forward_output_bias") for own in blocks_of(config)],
        r"tensors without a place in the model: model.layers.0.mlp.down_proj.bias",
    ),
}
"""Errors in a config.json that contradict the tensors of the folder."""


@pytest.mark.parametrize("case", WRONG)
def test_a_folder_whose_tensors_contradict_its_config_never_appears(tmp_path, checkpoint_folder, monkeypatch, case):
    (wrong, said), right = WRONG[case], writing.per_layer_config

    def made(*given: Any, **named: Any) -> dict[str, Any]:
        found = right(*given, **named)
        wrong(found)
        return found

    monkeypatch.setattr(writing, "per_layer_config", made)
    said += r".*; report this as a bug in secateur"
    assert_error(said, prune, checkpoint_folder("llama"), tmp_path / "out", **SMALL, recovery="bias")
    assert not list(tmp_path.iterdir())
