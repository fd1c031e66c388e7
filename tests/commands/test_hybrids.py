"""Models where another kind of layer stands in the attention's place in some blocks: heads go from the others."""

import json
from typing import Any

import pytest

from models import blocks_of, build
from outputs import assert_error
from secateur import SecateurError, prune

NAMES = ("qwen3_5_text", "lfm2")
SMALL: dict[str, Any] = {"samples": 8, "length": 16, "calibration": "random", "device": "cpu", "effort": "quick"}


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
    assert_error("the time of token mixers", prune, folder, out, **SMALL, target="decode=1.05x")
    with pytest.raises(SecateurError, match="heads cannot be removed exactly, because a token mixer stands"):
        prune(folder, out, **SMALL, modules=("heads",), sparsity=0.1, blocks="0:1")
    with pytest.raises(SecateurError, match="no biases of output projections, which --recovery bias adds"):
        prune(folder, out, **SMALL, widths="uniform", sparsity=0.2, recovery="bias")
