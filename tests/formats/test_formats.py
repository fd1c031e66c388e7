"""Every output format is found by its name, written and opened; limits of vLLM, which `tests/serving` checks."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFReader
from safetensors.torch import load_file

from formats.test_gguf import byte_level
from models import config_of, wide
from secateur import prune
from secateur.base.names import FORMATS
from secateur.formats.format import format_class
from secateur.formats.vllm import vllm_unsupported
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


FULL, FEWER, NONE = wide(2, 3, 72), wide(1, 3, 72), wide(0, 0, 72)


@pytest.mark.parametrize(
    ("name", "widths", "per_layer", "reason"),
    [
        ("llama", [FULL, NONE], True, None),
        ("llama", [FEWER, FEWER], False, None),
        ("llama", [NONE, NONE], True, "keep a head in one of them"),
        ("gpt2", [FULL, FULL], True, "prune channels only, in the stock format"),
        ("gpt2", [FULL, FULL], False, None),
        ("qwen2", [FULL, NONE], True, None),
        ("qwen2", [FULL, FULL], False, None),
        ("qwen2", [FEWER, FEWER], False, "which 3 heads of 8 do not give; serve it with --model-impl transformers"),
        ("lfm2", [wide(3, 2, 72), wide(2, 2, 72)], False, "which 4 heads of 8 do not give; prune channels only"),
        ("lfm2", [wide(3, 2, 40), wide(3, 2, 40)], False, None),
        ("qwen2 window", [FULL, FULL], True, None),
        ("qwen3_moe", [wide(3, 2, 20, 8), wide(3, 2, 20, 5)], True, None),
        ("qwen3_moe", [wide(3, 2, 20, 8), wide(3, 2, 16, 8)], True, "or keep expert channels with --modules"),
        ("qwen3_moe", [wide(3, 2, 16, 8), wide(3, 2, 16, 8)], False, None),
        ("mixtral", [wide(3, 2, 72, 8), wide(3, 2, 72, 5)], True, None),
        ("deepseek_v2", [wide(6, 1, 40), wide(5, 1, 40)], True, "needs the same latent attention in all blocks"),
        ("deepseek_v2", [wide(6, 1, 40), wide(6, 1, 40)], False, None),
        ("minimax_m2", [wide(3, 2, 72, 8), wide(3, 2, 72, 5)], True, "does not know the router of minimax_m2"),
        ("llama4_text", [wide(3, 2, 64), wide(3, 2, 72, 8)], True, "cannot load the experts of llama4_text"),
        ("gemma4_text mixture", [wide(2, 3, 20, 8), wide(2, 3, 20, 5)], True, "for experts parallel to a feed-forward"),
        ("gemma4_text", [wide(2, 3, 72), wide(2, 3, 40)], True, None),
        ("qwen2 window", [FULL, FULL], False, "all blocks or none; serve it with --model-impl transformers"),
    ],
)
def test_vllm_refuses_widths_that_it_cannot_run(name, widths, per_layer, reason):
    found = vllm_unsupported(config_of(name), widths, per_layer=per_layer)
    assert (found is None) if reason is None else (reason in (found or "")), found


@pytest.mark.parametrize("per_layer", [True, False])
def test_vllm_needs_equal_blocks_in_multimodal_checkpoints(per_layer):
    found = vllm_unsupported(config_of("llama"), [FULL, FULL], per_layer=per_layer, multimodal=True)
    said = "its multimodal models need the same widths in all blocks; use --widths uniform"
    assert found == (said if per_layer else None)
