"""`benchmarks/same.py compare` notices whatever differs from the record, and nothing else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import differences

RECORD = {"price": 0.25, "seconds": 1.5, "blocks": [{"block": 0, "heads": [0, 2], "channels": [1, 3, 4]}]}
SAID = "Prune 3 of 3, 0:07\n25.1% of the parameters go\n0.9 s, peak memory 0.38 GB. Written to out\n"


def written(folder: Path) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    shapes = {"down": (4, 3), "up": (3, 4)}
    save_file(
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, folder / "m.safetensors"
    )
    (folder / "secateur.json").write_text(json.dumps(RECORD))
    (folder / "stdout").write_text(SAID)
    return folder


def tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "m.safetensors")
        save_file(tensors | {"down": change(tensors["down"]).contiguous()}, folder / "m.safetensors")

    return apply


def record(**keys: Any) -> Callable[[Path], Any]:
    return lambda folder: (folder / "secateur.json").write_text(json.dumps(RECORD | keys))


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a tensor": (tensor(lambda down: down * 1.01), "1 of 2 tensors differ, down most: 0.01 of"),
    "a width": (tensor(lambda down: down[:, :2]), "other width: tensor down was ((4, 3)"),
    "metadata": (
        lambda one: save_file(load_file(one / "m.safetensors"), one / "m.safetensors", {"format": "pt"}),
        "the same tensors in other bytes",
    ),
    "a dtype": (tensor(torch.Tensor.half), "now ((4, 3), 'torch.float16')"),
    "no number": (tensor(lambda down: down * float("nan")), "tensors differ, down most: nan"),
    "a missing file": (lambda one: (one / "m.safetensors").unlink(), "m.safetensors: is missing now"),
    "a new file": (lambda one: (one / "more").write_text(""), "more: is new"),
    "a figure": (record(price=0.5), ".price was 0.25, now 0.5"),
    "a unit": (record(blocks=[{"heads": [0, 1], "channels": [1, 3, 4]}]), "units are others"),
    "a renamed key": (record(blocks=[{"head": [0, 2], "channels": [1, 3, 4]}]), "the same"),
    "a sentence": (lambda one: (one / "stdout").write_text(SAID.replace("go", "stay")), "stdout: 25.1% of the"),
    "a line": (lambda one: (one / "stdout").write_text(f"{SAID}more\n"), "2 lines, now 3"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_difference_is_noticed(change, tmp_path):
    before, after = written(tmp_path / "before"), written(tmp_path / "after")
    assert differences.folder_differences(before, after, differences.Rules()) == []
    act, expected = CHANGES[change]
    act(after)
    assert expected in "\n".join(differences.folder_differences(before, after, differences.Rules()))


def test_times_roundings_and_ignored_files_are_no_difference(tmp_path):
    before, after = written(tmp_path / "before"), written(tmp_path / "after")
    tensor(lambda down: down * (1 + 1e-6))(after)
    (after / "secateur.json").write_text(json.dumps(RECORD | {"seconds": 9}).replace('"price"', '"cost"'))
    (after / "stdout").write_text(SAID.replace("0:07", "1:07").replace("0.9 s", "1,234.5 s").replace("0.38", "0.40"))
    (after / "report.html").write_text("")
    rules = differences.Rules(within=1e-5, renamed={"price": "cost"}, ignored=("*.html",))
    assert differences.folder_differences(before, after, rules) == []
    assert len(differences.folder_differences(before, after, differences.Rules())) == 5
