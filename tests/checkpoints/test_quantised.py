"""Quantised weights are read as their own libraries read them, and pruned like the dequantised weights."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import models
from models import logits_of, save, token_rows
from outputs import error_of
from secateur import prune
from secateur.checkpoints.checkpoint import open_checkpoint
from secateur.checkpoints.quantised import dequantised
from secateur.checkpoints.weights import read_header
from secateur.measure.loading import load

DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 20]}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rewritten(folder: Path, how: dict[str, Any], change: Any) -> Path:
    """Replace every tensor of a folder by the tensors that `change(name, value)` returns."""
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(folder / "model.safetensors").items():
        tensors |= change(name, value)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | ({"quantization_config": how} if how else {})))
    return folder


def opened(tmp_path: Path, tensors: dict[str, Tensor], **how: Any) -> dict[str, Tensor]:
    """Save tensors and return them as secateur reads them."""
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "t.safetensors")
    found = dequantised(read_header(tmp_path / "t.safetensors"), how, tmp_path)
    values = {name: info.read() for name, info in found.items()}
    assert {name: (info.shape, info.dtype) for name, info in found.items()} == {
        name: (tuple(value.shape), value.dtype) for name, value in values.items()
    }
    return values


def blocks(weight: Tensor, block: list[int], dtype: torch.dtype = torch.float8_e4m3fn) -> dict[str, Tensor]:
    """Return a weight in float8 with one scale per block, computed block by block."""
    *stack, high, wide = weight.shape
    scale = torch.empty(*stack, math.ceil(high / block[0]), math.ceil(wide / block[1]))
    quantised = torch.empty_like(weight)
    for row in range(scale.shape[-2]):
        for column in range(scale.shape[-1]):
            part = (..., slice(row * block[0], (row + 1) * block[0]), slice(column * block[1], (column + 1) * block[1]))
            scale[..., row, column] = weight[part].abs().amax((-2, -1)) / torch.finfo(dtype).max
            quantised[part] = weight[part] / scale[..., row, column, None, None]
    return {"w": quantised.to(dtype), "w_scale_inv": scale}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("shape", [(32, 40), (3, 32, 40), (2, 37, 45)])
def test_float8_blocks_as_transformers_reads_them(tmp_path, shape, dtype):
    """Blocks at the edges may be incomplete, which transformers does not read."""
    parts = blocks(draw(*shape), [16, 20], dtype)
    found = opened(tmp_path, parts | {"w_activation_scale": torch.ones(1)}, **DEEPSEEK)
    spread = parts["w_scale_inv"].repeat_interleave(16, -2)[..., : shape[-2], :].repeat_interleave(20, -1)
    assert found.keys() == {"w"}
    assert torch.equal(found["w"], (parts["w"].float() * spread[..., : shape[-1]]).bfloat16())
    if shape[-2:] == (32, 40):
        wanted = Fp8Dequantize(None)._dequantize_one(parts["w"], parts["w_scale_inv"], torch.bfloat16)
        assert torch.equal(found["w"], wanted)


@pytest.mark.parametrize("scale", [torch.tensor(0.25), torch.tensor([0.25]), torch.tensor([[125]], dtype=torch.uint8)])
def test_one_scale_for_the_whole_tensor(tmp_path, scale):
    weight = draw(5, 7).to(torch.float8_e4m3fn)
    found = opened(tmp_path, {"w": weight, "w_scale_inv": scale}, quant_method="fp8", weight_block_size=None)
    assert torch.equal(found["w"], (weight.float() / 4).bfloat16())


def fp8(name: str, value: Tensor) -> dict[str, Tensor]:
    """Return a weight as DeepSeek and Qwen store it."""
    if value.dim() < 2 or "embed" in name or "head" in name:
        return {name: value}
    return {name + part.removeprefix("w"): value for part, value in blocks(value, [16, 20]).items()}


def in_bfloat16(name: str, value: Tensor) -> dict[str, Tensor]:
    parts = list(fp8(name, value).values())
    if len(parts) == 1:
        return {name: value}
    spread = parts[1].repeat_interleave(16, -2)[..., : value.shape[-2], :].repeat_interleave(20, -1)
    return {name: (parts[0].float() * spread[..., : value.shape[-1]]).bfloat16()}


@pytest.mark.parametrize("row", ["llama", "deepseek_v3"])
def test_pruned_like_the_dequantised_weights(tmp_path, row):
    for name, change in {"quantised": fp8, "plain": in_bfloat16}.items():
        rewritten(save(row, tmp_path / name, torch.bfloat16), DEEPSEEK if change is fp8 else {}, change)
        options = {"widths": "uniform", "sparsity": 0.3, "effort": "quick", "samples": 4, "length": 16}
        prune(tmp_path / name, tmp_path / f"{name}-out", calibration="random", **options)
    assert "quantization_config" not in json.loads((tmp_path / "quantised-out" / "config.json").read_text())
    weights = [(tmp_path / f"{name}-out" / "model.safetensors").read_bytes() for name in ("quantised", "plain")]
    assert weights[0] == weights[1]
    dense = [open_checkpoint(tmp_path / name) for name in ("quantised", "plain")]
    logits = [logits_of(load(one, torch.float32, torch.device("cpu")), token_rows()) for one in dense]
    assert torch.equal(logits[0], logits[1])


def mxfp4(name: str, value: Tensor) -> dict[str, Tensor]:
    """Return a weight of experts as gpt_oss stores it: a row per output, in groups of 32 entries of 4 bits."""
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {name: value}
    experts, inputs, outputs = value.shape
    generator = torch.Generator().manual_seed(len(name))
    halves = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(122, 126, (experts, outputs, inputs // 32), dtype=torch.uint8, generator=generator)
    return {f"{name}_blocks": halves, f"{name}_scales": scales}


WIDE = {"hidden_size": 64, "intermediate_size": 96}


def test_experts_of_gpt_oss_are_read_and_pruned(tmp_path, monkeypatch):
    row = models.MIXTURES["gpt_oss"]
    monkeypatch.setitem(models.MIXTURES, "gpt_oss", lambda: type(row())(**(row().to_dict() | WIDE)))
    folder = rewritten(save("gpt_oss", tmp_path / "m", torch.bfloat16), {"quant_method": "mxfp4"}, mxfp4)
    stored, checkpoint = load_file(folder / "model.safetensors"), open_checkpoint(folder)
    for name in ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.2.mlp.experts.down_proj"):
        wanted = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
        assert torch.equal(checkpoint.parameter(name).read(), wanted)
    prune(folder, tmp_path / "out", calibration="random", samples=4, length=16, widths="uniform", sparsity=0.3)
    written = read_header(tmp_path / "out" / "model.safetensors")
    assert written["model.layers.0.mlp.experts.down_proj"].dtype == torch.bfloat16
    assert not [name for name in written if name.endswith(("_blocks", "_scales"))]


FLOAT8 = torch.zeros(4, 6).to(torch.float8_e4m3fn)
BROKEN = {
    "no scales": ({"w": FLOAT8}, "the quantised weight w lacks w_scale_inv;"),
    "scales": ({"w": FLOAT8, "w_scale_inv": torch.ones(4, 4)}, r"w is \[4, 6\] and has scales of \[4, 4\]; down"),
    "4-bit floats": (
        {"w_blocks": torch.zeros(2, 4, 1, 16, dtype=torch.uint8), "w_scales": torch.zeros(2, 4, dtype=torch.uint8)},
        r"w_blocks is \[2, 4, 1, 16\] and has scales of \[2, 4\]",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_inconsistent_tensors_are_refused(tmp_path, case):
    tensors, message = BROKEN[case]
    assert re.search(message, error_of(opened, tmp_path, tensors, **DEEPSEEK))


@pytest.mark.parametrize("method", ["awq", "compressed-tensors"])
def test_unknown_quantisation_is_refused(tmp_path, method):
    folder = rewritten(save("llama", tmp_path / "m"), {"quant_method": method}, lambda name, value: {name: value})
    wanted = rf"quantised weights \({method}\), which cannot be dequantised here; fp8, mxfp4 can; use an unquantised"
    assert re.search(wanted, error_of(open_checkpoint, folder))
