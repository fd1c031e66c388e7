"""Every output format is found by its name, written and opened."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFReader
from safetensors.torch import load_file

from formats.test_gguf import byte_level
from secateur import prune
from secateur.formats.format import format_class
from secateur.formats.registry import FORMATS
from secateur.report.tables import prune_table


def folder_bytes(folder: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


SIZES: dict[str, Callable[[Path], int]] = {
    "hf": folder_bytes,
    "stock": folder_bytes,
    "gguf": lambda file: sum(tensor.n_bytes for tensor in GGUFReader(file).tensors),
}
"""Bytes of the weights in an output, by its format."""


def test_every_format_has_a_row():
    assert set(SIZES) == set(FORMATS)
    assert all(format_class(name).declaration is found for name, found in FORMATS.items())


@pytest.mark.parametrize("name", SIZES)
def test_an_output_has_the_bytes_that_were_counted(tmp_path, checkpoint_folder, name):
    model, out = tmp_path / "dense", tmp_path / f"out{FORMATS[name].suffix or ''}"
    shutil.copytree(checkpoint_folder("llama"), model)
    byte_level().save_pretrained(model)
    how = {"calibration": "random", "samples": 4, "length": 16, "effort": "quick"}
    summary = prune(model, out, format=name, widths="uniform", sparsity=0.3, **how)
    assert SIZES[name](out) == summary.bytes[1] < summary.bytes[0]
    assert {entry.name for entry in tmp_path.iterdir()} == {"dense", out.name}
    loading = format_class(name).how_to_load("AutoModelForCausalLM", str(out))
    assert loading.line in prune_table(summary, out)[1]
    assert str(out) in loading.line
