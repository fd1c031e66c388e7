"""The files of a written folder, and outputs that are refused."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import secateur.formats.hf as writing
from conftest import CheckpointFolder
from models import SIZES
from secateur import SecateurError, prune
from secateur.families.entry import Stock
from secateur.families.registry import FAMILIES
from secateur.model.stream import BlockStream

# Three quarters of its heads do not divide its hidden size.
MORE_ROWS = {"arcee 8 heads": lambda: AutoConfig.for_model("arcee", **SIZES | WIDE)}
WIDE = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
SMALL: dict[str, Any] = {"calibration": "random", "samples": 4, "length": 8, "device": "cpu", "effort": "quick"}


@pytest.mark.parametrize("asked", [{"dtype": "float16"}, {"format": "gguf", "type": "f16", "widths": "uniform"}])
def test_weights_too_large_for_float16_are_refused_early(
    tmp_path: Path, checkpoint_folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    model = tmp_path / "dense"
    shutil.copytree(checkpoint_folder("llama"), model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = -1e5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    class Begun(Exception):
        pass

    def begin(*_: Any) -> None:
        raise Begun

    monkeypatch.setattr(BlockStream, "embed", begin)
    out = tmp_path / ("out.gguf" if "type" in asked else "out")
    with pytest.raises(SecateurError, match=r"1.mlp.up_proj.weight holds 100,000, but float16 goes only to 65,504"):
        prune(model, out, **SMALL | asked)
    with pytest.raises(Begun):
        prune(model, tmp_path / "wide", **SMALL, dtype="bfloat16")


def test_licence_files_are_copied(tmp_path: Path, checkpoint_folder: CheckpointFolder) -> None:
    model = tmp_path / "dense"
    shutil.copytree(checkpoint_folder("llama"), model)
    files = ("LICENSE", "LICENCE.txt", "NOTICE", "USE_POLICY.md")
    for name in files:
        (model / name).write_text(f"{name} of the dense model")
    prune(model, tmp_path / "out", **SMALL)
    assert all((tmp_path / "out" / name).read_text() == f"{name} of the dense model" for name in files)


def test_a_folder_that_the_stock_class_refuses_never_appears(
    tmp_path: Path, checkpoint_folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = SMALL | {"widths": "uniform", "target": "kv=75%", "modules": ("heads",)}
    model = checkpoint_folder("arcee 8 heads")
    found = prune(model, tmp_path / "right", **asked)
    assert {width.kv_groups for width in found.widths.values()} == {2}
    shutil.rmtree(tmp_path / "right")
    monkeypatch.setitem(FAMILIES, "arcee", replace(FAMILIES["arcee"], stock=Stock()))
    said = r"out: transformers cannot open the written model, so it was deleted \(config.json: .*heads \(6\).*; use"
    with pytest.raises(SecateurError, match=said):
        prune(model, tmp_path / "out", **asked)
    assert not list(tmp_path.iterdir())


class WrongConfig:
    """Errors in a config.json that contradict the tensors of the folder."""

    @staticmethod
    def width(config: dict[str, Any]) -> None:
        for own in config["per_layer_config"].values():
            own["intermediate_size"] += 1

    @staticmethod
    def layers(config: dict[str, Any]) -> None:
        config["num_hidden_layers"] += 1

    @staticmethod
    def bias(config: dict[str, Any]) -> None:
        for own in config["per_layer_config"].values():
            own.pop("feed_forward_output_bias")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (WrongConfig.width, r"gate_proj.weight is \[\d+, 48\], but config.json makes it \[\d+, 48\] \(and 8 more\)"),
        (WrongConfig.layers, r"tensors missing from the weights: model.layers.3"),
        (WrongConfig.bias, r"tensors without a place in the model: model.layers.0.mlp.down_proj.bias"),
    ],
)
def test_a_folder_whose_tensors_contradict_its_config_never_appears(
    tmp_path: Path,
    checkpoint_folder: CheckpointFolder,
    monkeypatch: pytest.MonkeyPatch,
    wrong: Callable[[dict[str, Any]], None],
    said: str,
) -> None:
    right = writing.per_layer_config

    def made(*given: Any, **named: Any) -> dict[str, Any]:
        found = right(*given, **named)
        wrong(found)
        return found

    monkeypatch.setattr(writing, "per_layer_config", made)
    with pytest.raises(SecateurError, match=said + r".*; report this as a bug in secateur"):
        prune(checkpoint_folder("llama"), tmp_path / "out", **SMALL, recovery="bias")
    assert not list(tmp_path.iterdir())
