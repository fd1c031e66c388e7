"""Models where another kind of layer stands in the attention's place in some blocks: heads go from the others."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models import blocks_of, build
from secateur.base.errors import SecateurError
from secateur.commands.prune import prune

NAMES = ("qwen3_5_text", "lfm2")
SMALL: dict[str, Any] = {"samples": 8, "length": 16, "calibration": "random", "device": "cpu", "effort": "quick"}


@pytest.mark.parametrize("name", NAMES)
def test_the_stock_class_has_one_number_of_heads(tmp_path, checkpoint_folder, name):
    folder, out = checkpoint_folder(name), tmp_path / "out"
    found = prune(folder, out, **SMALL, modules=("heads",), sparsity=0.1, widths="uniform", recovery="none")
    mixer, *others = (found.widths[index] for index in range(3))
    blocks = blocks_of(build(name))
    full = blocks[1].width
    assert mixer == blocks[0].width
    assert others[0] == others[1]
    assert others[0].heads < full.heads
    config = json.loads((out / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (others[0].heads, others[0].kv_groups)
    before, after = (load_file(path / "model.safetensors") for path in (folder, out))
    beside = [key for key in before if ".layers.0." in key]
    assert all(torch.equal(before[key], after[key]) for key in beside)
    rows = {key: (len(before[key]), len(after[key])) for key in before if key.endswith("q_proj.weight")}
    assert len(rows) == 2
    # With a gate, a head has twice as many.
    assert all(now * full.heads == dense * others[0].heads for dense, now in rows.values())


@pytest.mark.parametrize("name", NAMES)
def test_similarity_prunes_only_blocks_with_attention(tmp_path, checkpoint_folder, name):
    found = prune(checkpoint_folder(name), tmp_path / "out", **SMALL, criterion="similarity", tau=0.17)
    full = blocks_of(build(name))[1].width
    assert set(found.widths) == {1, 2}
    assert any(width.heads < full.heads for width in found.widths.values())


@pytest.mark.parametrize("name", NAMES)
def test_token_mixers_have_no_keys_and_values(tmp_path, checkpoint_folder, name):
    found, block = (
        prune(checkpoint_folder(name), tmp_path / "out", **SMALL, target="kv=70%"),
        blocks_of(build(name))[1],
    )
    each = 2 * 4 * block.attention.size
    assert found.cache_bytes[0] == 2 * each * block.width.kv_groups
    assert found.cache_bytes[1] == each * (found.widths[1].kv_groups + found.widths[2].kv_groups)
    assert found.cache_bytes[1] <= 0.7 * found.cache_bytes[0]


@pytest.mark.parametrize("kept", [[], [0, 1, 2, 3]])
def test_a_plan_keeps_token_mixers_whole(tmp_path, checkpoint_folder, kept):
    (tmp_path / "plan.json").write_text(json.dumps({"blocks": [{"block": 0, "heads": kept}]}))
    with pytest.raises(SecateurError, match=r"block 0 has no heads; list its channels"):
        prune(checkpoint_folder("lfm2"), tmp_path / "out", **SMALL, plan=str(tmp_path / "plan.json"))
    none = {"token_mixers": 0, "channels": 72}
    (tmp_path / "plan.json").write_text(json.dumps({"blocks": [{"block": 0, "width": none}]}))
    with pytest.raises(SecateurError, match="0 token mixers are not possible; use 1"):
        prune(checkpoint_folder("lfm2"), tmp_path / "out", **SMALL, plan=str(tmp_path / "plan.json"))


def test_requests_that_token_mixers_rule_out_are_refused(tmp_path, checkpoint_folder):
    folder, out = checkpoint_folder("lfm2"), tmp_path / "out"
    with pytest.raises(SecateurError, match="the time of token mixers"):
        prune(folder, out, **SMALL, target="decode=1.05x")
    with pytest.raises(SecateurError, match="heads cannot be removed exactly, because a token mixer stands"):
        prune(folder, out, **SMALL, modules=("heads",), sparsity=0.1, blocks="0:1")
    with pytest.raises(SecateurError, match="no biases of output projections, which --recovery bias adds"):
        prune(folder, out, **SMALL, widths="uniform", sparsity=0.2, recovery="bias")
