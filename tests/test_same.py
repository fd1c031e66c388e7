"""`benchmarks/same.py compare` notices whatever differs from the record, and nothing else."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RECORD = {"price": 0.25, "seconds": 1.5, "blocks": [{"block": 0, "heads": [0, 2], "channels": [1, 3, 4]}]}
SAID = "Prune 3 of 3, 0:07\n25.1% of the parameters go\n0.9 s, peak memory 0.38 GB. Written to out\n"


@pytest.fixture(scope="module")
def differences() -> Any:
    """Import benchmarks/differences.py, which is not in a package."""
    spec = importlib.util.spec_from_file_location("differences", BENCHMARKS / "differences.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up.
    sys.modules["differences"] = module
    spec.loader.exec_module(module)
    return module


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


def change_tensor(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / "m.safetensors")
    save_file(tensors | {"down": change(tensors["down"]).contiguous()}, folder / "m.safetensors")


def change_record(folder: Path, **keys: Any) -> None:
    (folder / "secateur.json").write_text(json.dumps(RECORD | keys))


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a tensor": (lambda one: change_tensor(one, lambda down: down * 1.01), "1 of 2 tensors differ, down most: 0.01 of"),
    "a width": (lambda one: change_tensor(one, lambda down: down[:, :2]), "other width: tensor down was ((4, 3)"),
    "metadata": (
        lambda one: save_file(load_file(one / "m.safetensors"), one / "m.safetensors", {"format": "pt"}),
        "the same tensors in other bytes",
    ),
    "a dtype": (lambda one: change_tensor(one, torch.Tensor.half), "now ((4, 3), 'torch.float16')"),
    "no number": (lambda one: change_tensor(one, lambda down: down * float("nan")), "tensors differ, down most: nan"),
    "a missing file": (lambda one: (one / "m.safetensors").unlink(), "m.safetensors: is missing now"),
    "a new file": (lambda one: (one / "more").write_text(""), "more: is new"),
    "a figure": (lambda one: change_record(one, price=0.5), ".price was 0.25, now 0.5"),
    "a unit": (lambda one: change_record(one, blocks=[{"heads": [0, 1], "channels": [1, 3, 4]}]), "units are others"),
    "a renamed key": (lambda one: change_record(one, blocks=[{"head": [0, 2], "channels": [1, 3, 4]}]), "the same"),
    "a sentence": (lambda one: (one / "stdout").write_text(SAID.replace("go", "stay")), "stdout: 25.1% of the"),
    "a line": (lambda one: (one / "stdout").write_text(f"{SAID}more\n"), "2 lines, now 3"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_difference_is_noticed(change: str, differences: Any, tmp_path: Path) -> None:
    before, after = written(tmp_path / "before"), written(tmp_path / "after")
    assert differences.folder_differences(before, after, differences.Rules()) == []
    act, expected = CHANGES[change]
    act(after)
    assert expected in "\n".join(differences.folder_differences(before, after, differences.Rules()))


def test_times_roundings_and_ignored_files_are_no_difference(differences: Any, tmp_path: Path) -> None:
    before, after = written(tmp_path / "before"), written(tmp_path / "after")
    change_tensor(after, lambda down: down * (1 + 1e-6))
    (after / "secateur.json").write_text(json.dumps(RECORD | {"seconds": 9}).replace('"price"', '"cost"'))
    (after / "stdout").write_text(SAID.replace("0:07", "1:07").replace("0.9 s", "1,234.5 s").replace("0.38", "0.40"))
    (after / "report.html").write_text("")
    rules = differences.Rules(within=1e-5, renamed={"price": "cost"}, ignored=("*.html",))
    assert differences.folder_differences(before, after, rules) == []
    assert len(differences.folder_differences(before, after, differences.Rules())) == 5
