"""The stock layout: config classes build the model that was meant, from either spelling of its settings."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from models import MIXTURES, SIMILAR, config_of
from secateur.base.errors import SecateurError
from secateur.base.quiet import quiet
from secateur.families.registry import FAMILIES, family_of
from secateur.formats.stock import stock_config, stock_obstacle
from secateur.model.structure import Width

SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DENSE = Width(groups=3, per_group=2, channels=40)
EVERY_HEAD = Width(groups=6, per_group=1, channels=40)
HEAD = 8

LINEAR = {"rope_type": "linear", "factor": 2.0}
OLD_LINEAR = {"type": "linear", "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FACTORS = {"short_factor": [1.1, 1.2, 1.3, 1.4], "long_factor": [2.1, 2.2, 2.3, 2.4]}
LONG = {"type": "longrope", **FACTORS}
LONG_FACTOR = {"rope_type": "longrope", **FACTORS, "factor": 3.0, "original_max_position_embeddings": 32}


def raw(model_type: str, **keys) -> dict:
    """A config.json as a checkpoint may store it."""
    if model_type == "gpt2":
        sizes = {"vocab_size": 64, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64}
        sizes |= {"bos_token_id": 1, "eos_token_id": 2}
    elif model_type == "opt":
        sizes = {**SIZES, "ffn_dim": 40, "word_embed_proj_dim": 48}
        del sizes["intermediate_size"], sizes["num_key_value_heads"]
    else:
        sizes = dict(SIZES)
    if model_type in ("qwen3", "gemma2", "gemma3_text"):
        sizes["head_dim"] = HEAD
    if model_type.startswith("gemma"):
        sizes |= {"sliding_window": 8, "query_pre_attn_scalar": 8}
    return {"model_type": model_type, "architectures": ["Stored"], **sizes, **keys}


RAW = {
    "llama": raw("llama", rope_theta=500.0),
    "llama 5": raw("llama", rope_parameters={**LLAMA3, "rope_theta": 700.0}),
    "llama longrope": raw("llama", rope_theta=500.0, rope_scaling=LONG_FACTOR),
    "gemma3_text old": raw(
        "gemma3_text",
        rope_theta=700.0,
        rope_local_base_freq=123.0,
        rope_scaling=LINEAR,
        sliding_window_pattern=2,
    ),
    "gemma3_text 5": raw(
        "gemma3_text",
        rope_parameters={
            "full_attention": {**LINEAR, "rope_theta": 777.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 99.0},
        },
    ),
    "gemma3_text": raw("gemma3_text"),
    "phi3": raw("phi3", rope_theta=500.0, partial_rotary_factor=0.5),
    "phi3 longrope": raw("phi3", rope_theta=500.0, rope_scaling=LONG, original_max_position_embeddings=32),
    "mistral window": raw("mistral", sliding_window=8, head_dim=None),
    "qwen2 window": raw("qwen2", sliding_window=8, use_sliding_window=True, max_window_layers=1),
    "gpt2": raw("gpt2"),
    "gpt2 inner": raw("gpt2", n_inner=40),
    "opt": raw("opt"),
    "gpt_neox": raw("gpt_neox", rotary_pct=0.5, rotary_emb_base=500),
    "gpt_neox linear": raw("gpt_neox", rotary_pct=0.5, rotary_emb_base=500, rope_scaling=OLD_LINEAR),
    **{
        f"{kind} {name}": raw(kind, rope_theta=500.0, rope_scaling=scaling)
        for kind in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "olmo2")
        for name, scaling in (("linear", LINEAR), ("old", OLD_LINEAR), ("dynamic", DYNAMIC))
    },
    **{
        f"{kind} {name}": raw(kind, rope_theta=500.0, rope_scaling=scaling)
        for kind in ("llama", "mistral", "qwen2", "qwen3", "gemma2")
        for name, scaling in (("yarn", YARN), ("llama3", LLAMA3))
    },
}


def load(stored: dict, tmp_path):
    """The config object that a folder with this config.json gives."""
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with quiet():
        return AutoConfig.from_pretrained(tmp_path)


def logits(config, state: dict | None = None):
    """A model's logits on 60 fixed tokens, and its weights; seeded random ones unless given."""
    torch.manual_seed(1)
    with quiet():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    if state is None:
        for value in model.parameters():
            value.data.add_(0.08 * torch.randn_like(value))
        state = model.state_dict()
    else:
        model.load_state_dict(state)
    ids = torch.arange(3, 63).view(1, 60)
    with torch.no_grad():
        return model(ids).logits, state


def dense_of(config) -> Width:
    if family_of(config).stock.heads != "dense":
        return DENSE
    channels = {"gpt2": 192, "opt": 40, "gpt_neox": 40}[config.model_type]
    return Width(6, 1, getattr(config, "n_inner", None) or channels)


OLD_ONLY = ("torch_dtype", "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")
OLD_ONLY += ("rotary_pct", "rotary_emb_base")
NEW_ONLY = ("dtype", "rope_parameters")


def test_every_family_is_covered():
    """Here, or by the matrix, which loads what is written, and `tests/older`."""
    similar = {config_of(name).model_type for name in SIMILAR | MIXTURES}
    assert {stored["model_type"] for stored in RAW.values()} == set(FAMILIES) - similar


@pytest.mark.parametrize("case", RAW)
def test_dense_width_is_the_identity_in_both_spellings(tmp_path, case):
    before = copy.deepcopy(RAW[case])
    config = load(RAW[case], tmp_path)
    expected, state = logits(config)
    stored = stock_config(RAW[case], config, width=dense_of(config), head_dim=HEAD, dtype=torch.float16)
    assert RAW[case] == before
    assert stored["dtype"] == stored["torch_dtype"] == "float16"
    assert stored["model_type"] == config.model_type
    assert stored["architectures"] == ["Stored"]
    for dropped in ((), OLD_ONLY, NEW_ONLY):
        again = load({key: value for key, value in stored.items() if key not in dropped}, tmp_path)
        assert again.dtype == torch.float16
        again.dtype = None
        assert torch.equal(logits(again, state)[0], expected), dropped


NARROW = {
    "llama linear": Width(2, 2, 24),
    "mistral window": Width(1, 1, 24),
    "qwen2 window": Width(5, 1, 24),
    "qwen3 yarn": Width(1, 5, 24),
    "gemma2 linear": Width(2, 2, 24),
    "gemma3_text 5": Width(1, 2, 24),
    "phi3": Width(1, 5, 24),
    "phi3 longrope": Width(3, 2, 24),
    "olmo2 linear": Width(3, 2, 24),
    "gpt2": Width(6, 1, 24),
    "opt": Width(6, 1, 24),
    "gpt_neox": Width(6, 1, 24),
}


@pytest.mark.parametrize("case", NARROW)
def test_narrow_models_load(tmp_path, case):
    width = NARROW[case]
    config = load(RAW[case], tmp_path)
    assert stock_obstacle(config, width, dense_of(config)) is None
    narrow = load(stock_config(RAW[case], config, width=width, head_dim=HEAD, dtype=torch.float32), tmp_path)
    values, state = logits(narrow)
    assert values.isfinite().all()
    shapes = {name.split(".", 3)[-1]: tuple(value.shape) for name, value in state.items() if ".1." in name}
    q, kv, f = width.heads * HEAD, width.groups * HEAD, width.channels
    expected = {
        "gpt2": {"attn.c_attn.weight": (48, 144), "mlp.c_fc.weight": (48, f), "mlp.c_proj.weight": (f, 48)},
        "opt": {"1.self_attn.q_proj.weight": (48, 48), "1.fc1.weight": (f, 48)},
        "gpt_neox": {"attention.dense.weight": (48, 48), "mlp.dense_h_to_4h.weight": (f, 48)},
        "phi3": {"self_attn.qkv_proj.weight": (q + 2 * kv, 48), "mlp.gate_up_proj.weight": (2 * f, 48)},
    }.get(
        config.model_type,
        {
            "self_attn.q_proj.weight": (q, 48),
            "self_attn.k_proj.weight": (kv, 48),
            "self_attn.o_proj.weight": (48, q),
            "mlp.down_proj.weight": (48, f),
        },
    )
    assert expected.items() <= shapes.items()


def test_llama_with_odd_heads_is_written_as_mistral(tmp_path):
    stored_llama = {**RAW["llama yarn"], "transformers_version": "4.40.0", "auto_map": {"AutoConfig": "c.C"}}
    config = load(RAW["llama yarn"], tmp_path)
    assert stock_obstacle(config, Width(1, 5, 40), DENSE) is None
    stored = stock_config(stored_llama, config, width=Width(1, 5, 40), head_dim=HEAD, dtype=torch.float32)
    assert stored["model_type"] == "mistral"
    assert stored["architectures"] == ["MistralForCausalLM"]
    assert stored["sliding_window"] is None
    assert stored["num_attention_heads"] == 5
    assert stored["transformers_version"] >= "5"
    assert "auto_map" not in stored
    assert logits(load(stored, tmp_path))[0].isfinite().all()
    # The two classes compute the same: the dense weights, in the class that was chosen for another width.
    expected, state = logits(config)
    as_dense = {**stored, "num_attention_heads": 6, "num_key_value_heads": 3}
    assert torch.equal(logits(load(as_dense, tmp_path), state)[0], expected)


@pytest.mark.parametrize(
    ("case", "keys", "width", "message"),
    [
        (
            "llama",
            {"attention_bias": True},
            Width(1, 5, 40),
            "mistral, which takes 5, has no attention_bias; keep",
        ),
        (
            "llama",
            {"attention_bias": True, "mlp_bias": True},
            Width(1, 5, 40),
            "has no attention_bias or mlp_bias; keep one of 1, 2, 3, 4, 6 heads",
        ),
        ("llama", {"attention_bias": True}, Width(1, 4, 40), None),
        (
            "gemma2 linear",
            {},
            Width(1, 5, 40),
            "gemma2 takes head counts that divide hidden_size 48 only, not 5",
        ),
        (
            "gemma3_text",
            {},
            Width(5, 1, 40),
            "keep one of 1, 2, 3, 4, 6 heads",
        ),
        ("phi3 longrope", {}, Width(2, 2, 40), "phi3 ties its LongRoPE factors to hidden_size / heads"),
        ("phi3 longrope", {}, Width(3, 2, 8), None),
        (
            "gpt2",
            {},
            Width(5, 1, 40),
            "gpt2 derives its head size .* keeps all 6 heads; prune channels only",
        ),
        ("opt", {}, Width(3, 1, 40), "opt derives its head size"),
        ("gpt_neox", {}, Width(3, 1, 40), "gpt_neox derives its head size"),
        ("mistral window", {}, Width(0, 2, 40), "at least one head and one channel"),
        ("mistral window", {}, Width(3, 2, 0), "at least one head and one channel"),
        ("mistral window", {}, Width(5, 1, 1), None),
    ],
)
def test_obstacles(tmp_path, case, keys, width, message):
    config = load({**RAW[case], **keys}, tmp_path)
    obstacle = stock_obstacle(config, width, EVERY_HEAD if family_of(config).stock.heads == "dense" else DENSE)
    if message is None:
        assert obstacle is None
    else:
        assert re.search(message, obstacle or "")


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text", "gpt_neox"])
def test_the_refusals_are_real(kind):
    """The table follows the config classes; should a class become lenient, the table can too."""
    with pytest.raises(Exception, match=r"multiple|divisible"):
        AutoConfig.for_model(kind, **{**SIZES, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 8})


def test_unknown_families(tmp_path):
    config = load(raw("persimmon"), tmp_path)
    with pytest.raises(SecateurError, match="'persimmon'"):
        stock_obstacle(config, DENSE, DENSE)
    with pytest.raises(SecateurError, match="'persimmon'"):
        stock_config(raw("persimmon"), config, width=DENSE, head_dim=HEAD, dtype=torch.float32)
