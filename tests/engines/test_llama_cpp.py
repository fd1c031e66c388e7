"""Pruned GGUF files that llama.cpp quantises load, and predict almost as before."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import ROWS, prune
from formats.test_gguf import ffi, lib, run
from models import POSITIONS, _config, build, make_letters, relative
from secateur.base.quiet import quiet
from secateur.gguf.export import export

# K-quants need rows of a multiple of 256 entries.
SIZE = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
ROWS["llama 256"] = _config("llama", **SIZE, intermediate_size=512)
PLANS = {
    "stock": [{"heads": 4, "channels": 256}] * 3,
    "hf": [{"heads": 4, "channels": 512}, {"heads": 8, "channels": 256}, {"heads": 4, "channels": 256}],
}
TYPES = {"q8_0": (7, 0.03), "q4_0": (2, 0.4), "q4_K_M": (15, 0.3)}
"""Number of each type in llama.cpp, and the accepted deviation of a logit relative to the largest one."""
WINDOWS = 2048 // POSITIONS


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the f16 file of each format."""
    place, made = tmp_path_factory.mktemp("gguf"), {}
    with quiet():
        build("llama 256").save_pretrained(place / "dense")
        make_letters().save_pretrained(place / "dense")
    for format, counts in PLANS.items():
        prune(place / "dense", place / format, format, counts)
        made[format] = export(place / format, place / f"{format}.gguf", type="f16").path
    lib.llama_backend_init()
    return made


def scored(file: Path) -> tuple[Tensor, float]:
    """Return the logits of the first window, and the perplexity on 2,048 tokens."""
    ids = torch.randint(120, (WINDOWS, POSITIONS), generator=torch.Generator().manual_seed(0))
    each = torch.stack([run(file, row) for row in ids.tolist()])
    losses = torch.nn.functional.cross_entropy(each[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return each[0], math.exp(losses)


@pytest.mark.parametrize("format", PLANS)
def test_quantised_files_predict_almost_the_same(files, format, tmp_path):
    expected, perplexity = scored(files[format])
    assert math.isfinite(perplexity)
    for name, (number, near) in TYPES.items():
        out = tmp_path / f"{name}.gguf"
        settings = ffi.new("llama_model_quantize_params *", lib.llama_model_quantize_default_params())
        settings.ftype, settings.nthread = number, 1
        assert lib.llama_model_quantize(str(files[format]).encode(), str(out).encode(), settings) == 0
        assert out.stat().st_size < files[format].stat().st_size
        found, other = scored(out)
        assert 0 < relative(found, expected) < near
        assert abs(math.log(other / perplexity)) < 0.2
