"""Pruned folders quantised by torchao and llm-compressor keep their logits nearly, and can be saved and opened."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors import safe_open
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
from transformers import TorchAoConfig

from conftest import LLAMA, MIXTURE, apart, load, logits

NEAR = {8: 0.04, 4: 0.35}
"""Accepted deviation of logits by number of bits; random weights are hard to round."""


def settings(bits: int) -> Any:
    return {8: Int8WeightOnlyConfig(), 4: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))}[bits]


@pytest.mark.parametrize("bits", NEAR)
def test_torchao_keeps_logits_near(folders, case, bits, tmp_path):
    expected = logits(load(folders(case), dtype=torch.bfloat16))
    later = load(folders(case), dtype=torch.bfloat16)
    quantize_(later, settings(bits))
    assert 0 < apart(logits(later), expected) < NEAR[bits]
    at_once = load(folders(case), dtype=torch.bfloat16, quantization_config=TorchAoConfig(settings(bits)))
    assert 0 < apart(logits(at_once), expected) < NEAR[bits]
    at_once.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved", dtype=torch.bfloat16)), logits(at_once))


def compress(folder: Path, bits: int, out: Path) -> torch.Tensor:
    """Round a model to the nearest values with llm-compressor, save it, and return its logits."""
    rounding = {"strategy": "channel"} if bits == 8 else {"strategy": "group", "group_size": 32}
    weights = QuantizationArgs(num_bits=bits, symmetric=True, **rounding)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    model = load(folder)
    # Routers are not quantised.
    ignore = ["lm_head", "re:.*mlp[.]gate$"]
    oneshot(model=model, recipe=QuantizationModifier(config_groups={"all": scheme}, ignore=ignore))
    model.save_pretrained(out, save_compressed=True)
    return logits(model)


@pytest.mark.parametrize("bits", NEAR)
@pytest.mark.parametrize("case", [(LLAMA, "stock"), (LLAMA, "hf"), (MIXTURE, "stock")], ids="-".join)
def test_llm_compressor_keeps_logits_near(folders, case, bits, tmp_path):
    expected = logits(load(folders(case)))
    found = compress(folders(case), bits, tmp_path / "saved")
    assert 0 < apart(found, expected) < NEAR[bits]
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert any(name.endswith("weight_packed") for name in file.keys())  # noqa: SIM118
    assert apart(logits(load(tmp_path / "saved")), found) < 1e-5


def test_llm_compressor_refuses_layers_with_different_numbers_of_experts(folders, tmp_path):
    """If this works one day, docs/engines.md is out of date."""
    with pytest.raises(IndexError, match="out of bounds"):
        compress(folders((MIXTURE, "hf")), 8, tmp_path / "saved")
