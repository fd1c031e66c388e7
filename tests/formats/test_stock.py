"""The stock layout: config classes build the model that was meant, from either spelling of its settings."""

import copy
import json
import re

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from models import MIXTURES, ROWS, SIMILAR, build, config_of, logits_of, token_rows, wide
from secateur.base.quiet import quiet
from secateur.checkpoints.config_file import stock_class
from secateur.checkpoints.facts import key_value_heads
from secateur.families.registry import FAMILIES, family_of
from secateur.formats.stock import stock_config, stock_unsupported
from secateur.model.axes import Width
from secateur.model.describe import describe
from secateur.model.surgery import first_units, slice_block
from secateur.model.units.heads import HEADS as HEAD_AXES
from secateur.plan.widths import head_widths

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
DENSE = wide(groups=3, per_group=2, channels=40)
EVERY_HEAD = wide(groups=6, per_group=1, channels=40)
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
        "gemma3_text", rope_theta=700.0, rope_local_base_freq=123.0, rope_scaling=LINEAR, sliding_window_pattern=2
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
        for kind in ("llama", "gemma2", "olmo2")
        for name, scaling in (("linear", LINEAR), ("old", OLD_LINEAR), ("dynamic", DYNAMIC))
    },
    **{
        f"{kind} {name}": raw(kind, rope_theta=500.0, rope_scaling=scaling)
        for kind in ("llama", "qwen3")
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
    if family_of(config).head_counts != "dense" or config.model_type == "phi3":
        return DENSE
    channels = {"gpt2": 192, "opt": 40, "gpt_neox": 40}[config.model_type]
    return wide(6, 1, getattr(config, "n_inner", None) or channels)


OLD_ONLY = ("torch_dtype", "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")
OLD_ONLY += ("rotary_pct", "rotary_emb_base")
NEW_ONLY = ("dtype", "rope_parameters")


def test_every_family_is_covered():
    """The matrix and `tests/older` load the families that have no case here."""
    similar = {config_of(name).model_type for name in SIMILAR | MIXTURES}
    assert {stored["model_type"] for stored in RAW.values()} == set(FAMILIES) - similar


@pytest.mark.parametrize("case", RAW)
def test_dense_width_is_the_identity_in_both_spellings(tmp_path, case):
    before = copy.deepcopy(RAW[case])
    config = load(RAW[case], tmp_path)
    expected, state = logits(config)
    stored = stock_config(RAW[case], config, width=dense_of(config), dtype=torch.float16)
    assert RAW[case] == before
    assert stored["dtype"] == stored["torch_dtype"] == "float16"
    assert stored["model_type"] == config.model_type
    assert stored["architectures"] == ["Stored"]
    for dropped in ((), OLD_ONLY, NEW_ONLY):
        again = load({key: value for key, value in stored.items() if key not in dropped}, tmp_path)
        assert again.dtype == torch.float16
        again.dtype = None
        assert torch.equal(logits(again, state)[0], expected), dropped


@pytest.mark.parametrize("leaves_defaults_out", [False, True])
@pytest.mark.parametrize("kind", [kind for kind, family in FAMILIES.items() if family.stock.fallback])
def test_an_heir_computes_the_same(tmp_path, kind, leaves_defaults_out):
    """The dense weights, in the class that is chosen for another width, which has other defaults."""
    config, dense = config_of(kind), build(kind, attn_implementation="eager")
    raw = (config.to_diff_dict() if leaves_defaults_out else config.to_dict()) | {
        "transformers_version": "4.40.0",
        "auto_map": {"AutoConfig": "c.C"},
    }
    odd = stock_config(raw, config, width=wide(1, 5, 72), dtype=torch.float32)
    assert (odd["model_type"], odd["num_attention_heads"]) == (FAMILIES[kind].stock.fallback[0], 5)
    assert odd["transformers_version"] >= "5"
    assert "auto_map" not in odd
    heir = load(odd | {"num_attention_heads": 6, "num_key_value_heads": 3}, tmp_path)
    assert heir.rms_norm_eps == config.rms_norm_eps
    with quiet():
        model = AutoModelForCausalLM.from_config(heir, attn_implementation="eager").eval()
    assert odd["architectures"] == [type(model).__name__]
    model.load_state_dict(dense.state_dict())
    assert torch.equal(logits_of(model, token_rows()), logits_of(dense, token_rows()))


UNSUPPORTED: list[tuple[str, dict[str, bool], Width, str | None]] = [
    ("llama", {"attention_bias": True}, wide(1, 5, 40), "mistral, which supports 5, has no attention_bias; keep"),
    (
        "llama",
        dict.fromkeys(("attention_bias", "mlp_bias"), True),
        wide(1, 5, 40),
        "has no attention_bias or mlp_bias; ",
    ),
    ("llama", {"attention_bias": True}, wide(1, 4, 40), None),
    ("gemma2 linear", {}, wide(1, 5, 40), "gemma2 supports only head counts that divide hidden_size 48, not 5"),
    ("phi3 longrope", {}, wide(2, 2, 40), "phi3 derives its head size from hidden_size / heads"),
    ("phi3 longrope", {}, wide(3, 2, 8), None),
    ("gpt2", {}, wide(5, 1, 40), "gpt2 derives its head size .* keeps all 6 heads; prune channels only"),
    ("mistral window", {}, wide(0, 2, 40), "at least one head and one channel"),
    ("mistral window", {}, wide(3, 2, 0), "at least one head and one channel"),
    ("mistral window", {}, wide(5, 1, 1), None),
]


@pytest.mark.parametrize(("case", "keys", "width", "message"), UNSUPPORTED)
def test_unsupported_reasons(tmp_path, case, keys, width, message):
    config = load({**RAW[case], **keys}, tmp_path)
    dense = EVERY_HEAD if case == "gpt2" else DENSE
    reason = stock_unsupported(config, width, dense)
    assert reason is None if message is None else re.search(message, reason or "")


GROUPS = ("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads")
HEADS = {"hidden_size": 64, "num_attention_heads": 8}
"""Sizes that make 3, 5, 6 and 7 heads no divisors of the hidden size; the rows have no such number of heads."""
HEADED = [name for name in ROWS | SIMILAR | MIXTURES if " " not in name or name.startswith("falcon")]
"""One row a family, and each of Falcon's ways to share keys."""


def with_more_heads(name: str):
    """A row's config with 8 heads, in 4 groups where it has any, on a residual stream of 64."""
    own = config_of(name)
    names = {type(own).attribute_map.get(key, key): value for key, value in HEADS.items()}
    every = family_of(own).latent or key_value_heads(own) == own.num_attention_heads
    groups = {key: 8 if every else 4 for key in GROUPS if (getattr(own, key, None) or 1) > 1}
    # OPT's embedding need not be as wide as its residual stream; Bamba's heads of Mamba have the rest of it.
    keys = own.to_dict() | names | groups | {"word_embed_proj_dim": 64, "mamba_d_head": "auto"}
    config = type(own).from_dict(copy.deepcopy(keys))
    config.allow_global_per_layer_attribute_access = True
    return config


@pytest.mark.parametrize("name", HEADED)
def test_the_class_takes_just_the_heads_that_the_table_says(name):
    """Each number of heads and of groups, opened on the meta device; blocks have the shapes that would be stored."""
    with quiet():
        config = with_more_heads(name)
        layers = empty(config).get_submodule(family_of(config).blocks)
        blocks = [describe(config, layer) for layer in layers]
        free = next((block for block in blocks if not block.heads_locked), blocks[0])
        for width in head_widths(free, ("heads",)):
            assert (stock_unsupported(config, width, free.width) is None) == opens(config, blocks, width), width


def empty(config):
    with torch.device("meta"), no_init_weights():
        return stock_class(MODEL_FOR_CAUSAL_LM_MAPPING, type(config))(config)


def opens(config, blocks, width) -> bool:
    """Whether the stock class makes blocks of a width; the classes that keep all heads are not asked for fewer."""
    if family_of(config).head_counts == "dense" and width.product(HEAD_AXES) < config.num_attention_heads:
        return False
    raw = json.loads(json.dumps(config.to_dict()))
    stored = stock_config(raw, config, width=width, dtype=torch.float32)
    try:
        narrow = CONFIG_MAPPING[stored["model_type"]].from_dict(stored)
        model = empty(narrow)
    except StrictDataclassClassValidationError:
        return False
    layers = model.get_submodule(family_of(narrow).blocks)
    for block, layer in zip(blocks, layers, strict=True):
        narrowed = {axis.name for axis in block.modules[0].axes if not axis.locked}
        keep = first_units(block, block.width | {axis: width[axis] for axis in narrowed})
        dense = {name: torch.empty(shape, device="meta") for name, shape in block.shapes.items()}
        wanted = {name: tensor.shape for name, tensor in slice_block(block, dense, keep).items()}
        if {name: tensor.shape for name, tensor in layer.state_dict().items()} != wanted:
            return False
    return True
