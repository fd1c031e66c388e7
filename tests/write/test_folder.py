"""What goes into a written folder, and what is refused before it is begun."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from conftest import CheckpointFolder
from secateur import SecateurError, prune
from secateur.model.stream import BlockStream

SMALL: dict[str, Any] = {"calibration": "random", "samples": 4, "length": 8, "device": "cpu", "effort": "quick"}


@pytest.mark.parametrize("asked", [{"dtype": "float16"}, {"format": "gguf", "type": "f16", "widths": "uniform"}])
def test_weights_beyond_float16_are_named_beforehand(
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
    with pytest.raises(SecateurError, match=r"1.mlp.up_proj.weight holds 100,000, and float16 no more than 65,504"):
        prune(model, out, **SMALL | asked)
    with pytest.raises(Begun):
        prune(model, tmp_path / "wide", **SMALL, dtype="bfloat16")


def test_what_a_licence_asks_for_goes_along(tmp_path: Path, checkpoint_folder: CheckpointFolder) -> None:
    model = tmp_path / "dense"
    shutil.copytree(checkpoint_folder("llama"), model)
    files = ("LICENSE", "LICENCE.txt", "NOTICE", "USE_POLICY.md")
    for name in files:
        (model / name).write_text(f"{name} of the dense model")
    prune(model, tmp_path / "out", **SMALL)
    assert all((tmp_path / "out" / name).read_text() == f"{name} of the dense model" for name in files)
