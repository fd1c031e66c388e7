"""Limits of vLLM as secateur states them, without vLLM; `tests/serving` checks them with vLLM itself."""

import pytest

from models import config_of, wide
from secateur.formats.vllm import vllm_unsupported

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
def test_unsupported(name, widths, per_layer, reason):
    found = vllm_unsupported(config_of(name), widths, per_layer=per_layer)
    assert (found is None) if reason is None else (reason in (found or "")), found


@pytest.mark.parametrize("per_layer", [True, False])
def test_inside_a_multimodal_checkpoint(per_layer):
    found = vllm_unsupported(config_of("llama"), [FULL, FULL], per_layer=per_layer, multimodal=True)
    assert found == (
        "its multimodal models need the same widths in all blocks; use --widths uniform" if per_layer else None
    )
