"""A GGUF file for llama.cpp: metadata, tokenizer and tensors, written from start to end."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter, RopeScalingType
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from secateur.base.progress import Watcher
from secateur.formats.gguf_architecture import Architecture
from secateur.formats.gguf_model import GgufModel
from secateur.formats.gguf_tensors import Entry, laid_out
from secateur.formats.gguf_tokenizer import Vocabulary, add_vocabulary
from secateur.formats.gguf_types import TYPES
from secateur.model.axes import Width


def write_gguf(
    path: Path,
    model: GgufModel,
    architecture: Architecture,
    tensors: Sequence[Entry],
    words: Vocabulary,
    *,
    type: str,
    name: str,
    watcher: Watcher,
) -> None:
    """Write a file from start to end.

    Architecture, tensors and words come from `choose`, `entries` and `vocabulary`; type is a name in `TYPES`, and name
    that of the model, for people.
    """
    writer = GGUFWriter(None, architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(words.named(name))
    writer.add_file_type(TYPES[type].file)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(len(words.tokens))
    _add_sizes(writer, model, architecture, type)
    _add_rope(writer, model, architecture)
    add_vocabulary(writer, words)
    for entry in tensors:
        writer.add_tensor_info(entry.name, entry.tensor.shape, np.dtype(np.float32), entry.bytes, entry.type)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in watcher.track(tensors, "Writing"):
            writer.write_tensor_data(entry.data())
    finally:
        writer.close()


def check_tensors(file: Path, expected: Sequence[Entry]) -> str | None:
    """Return how the tensors of a file differ from those that were to be written, as a clause, or None.

    The gguf package's reader opens the file, and reads no weights.
    """
    wanted = {entry.name: (list(entry.tensor.shape), entry.type) for entry in expected}
    # GGUF names the fastest axis first.
    found = {one.name: ([*map(int, one.shape[::-1])], one.tensor_type) for one in GGUFReader(file).tensors}
    name = next((name for name in {**wanted, **found} if wanted.get(name) != found.get(name)), None)
    return None if name is None else f"{name} is {found.get(name)} where {wanted.get(name)} was to be stored"


_DEEP = re.compile(r"\.deepstack_merger_list\.(\d+)\.")
"""Layers that make of a tower's inner states what a block adds (Qwen3-VL)."""


def context_length(model: GgufModel, architecture: Architecture) -> int:
    """Positions over which llama.cpp computes what the model does: a window that it does not apply ends them."""
    longest = model.positions
    return longest if architecture.windows or model.window is None else min(longest, model.window)


def _add_sizes(writer: GGUFWriter, model: GgufModel, architecture: Architecture, type: str) -> None:
    config, widths = model.config, laid_out(model, architecture, type)
    # What blocks without experts have, where the config says both.
    apart = model.family.experts is not None and model.family.experts.expert_width != "intermediate_size"
    dense = getattr(config, "intermediate_size", 0) if apart else 0
    writer.add_context_length(context_length(model, architecture))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(widths))
    counts = {
        writer.add_head_count: [width.heads for width in widths],
        writer.add_head_count_kv: [_shared_heads(model, architecture, i, width) for i, width in enumerate(widths)],
        writer.add_feed_forward_length: [dense if width.experts and dense else width.channels for width in widths],
    }
    for add, values in counts.items():
        add(values if architecture.per_layer or 0 in values else values[0])
    if architecture.linear:
        _add_linear(writer, model)
    elif model.family.token_mixer is not None:
        writer.add_shortconv_l_cache(config.conv_L_cache)
    if architecture.latent:
        _add_latent(writer, model)
    elif model.family.heads_by_layer_type:
        _add_mixed(writer, model)
    else:
        writer.add_key_length(model.dim)
        writer.add_value_length(model.dim)
    # OLMo's first norms have it in their code.
    epsilon = 1e-5 if architecture.final_norm is None else float(getattr(config, model.source.epsilon))
    (writer.add_layer_norm_rms_eps if architecture.epsilon == "rms" else writer.add_layer_norm_eps)(epsilon)
    if architecture.scales:
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if any(width.experts for width in widths):
        _add_experts(writer, model, architecture)
    elif architecture.leading:
        writer.add_leading_dense_block_count(len(widths))
        writer.add_expert_feed_forward_length(0)
        writer.add_expert_shared_count(0)
    if clip := getattr(getattr(config, "attn_config", config), "clip_qkv", None):
        writer.add_clamp_kqv(clip)
    for add_own in architecture.settings:
        add_own(writer, model)
    # What a tower hands to the first blocks comes with the embeddings.
    if deep := {found[1] for name in model.checkpoint.tensors if (found := _DEEP.search(name))}:
        writer.add_num_deepstack_layers(len(deep))
    if getattr(config, "final_logit_softcapping", None) and not model.family.heads_by_layer_type:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if model.family.heads_by_layer_type:
        writer.add_sliding_window(model.window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    elif architecture.windows and model.window is not None:
        writer.add_sliding_window(model.window)
        writer.add_sliding_window_pattern(model.period)
    elif architecture.always_windows:
        writer.add_sliding_window(config.max_position_embeddings)


def _shared_heads(model: GgufModel, architecture: Architecture, index: int, width: Width) -> int:
    """Key/value heads of a block in a file."""
    if model.family.heads_by_layer_type:
        return model.heads_of(index)[1]
    # None where something else stands in the attention's place, unless the file says otherwise which blocks these are.
    if model.mixes(index) and not architecture.linear:
        return 0
    return 1 if architecture.latent else width.groups


def _add_mixed(writer: GGUFWriter, model: GgufModel) -> None:
    config, kinds = model.config, model.config.layer_types
    full, around = (model.heads_of(kinds.index(f"{kind}_attention"))[0] for kind in ("full", "sliding"))
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(full)
    for add in (writer.add_key_length_swa, writer.add_value_length_swa, writer.add_rope_dimension_count_swa):
        add(around)
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    # Else llama.cpp takes 30 for the cap.
    writer.add_final_logit_softcapping(config.final_logit_softcapping or 0.0)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input or 0)


def _add_linear(writer: GGUFWriter, model: GgufModel) -> None:
    config = model.config
    writer.add_full_attention_interval(model.period)
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_num_value_heads * config.linear_value_head_dim)


def _add_latent(writer: GGUFWriter, model: GgufModel) -> None:
    """What is kept of a token is the latent vector and the rotated part of a key."""
    config = model.config
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    if config.q_lora_rank:
        writer.add_q_lora_rank(config.q_lora_rank)


def _add_experts(writer: GGUFWriter, model: GgufModel, architecture: Architecture) -> None:
    config, names, widths = model.config, model.family.experts, model.widths
    assert names is not None
    first = next(index for index, width in enumerate(widths) if width.experts)
    writer.add_expert_count(widths[first].experts)
    met = getattr(config, names.experts_per_token)
    writer.add_expert_used_count(max(met) if isinstance(met, list) else met)
    writer.add_expert_feed_forward_length(widths[first].channels)
    if names.shared_expert is not None:
        name = f"{model.family.feed_forward}.{names.shared_expert}.down_proj.weight"
        writer.add_expert_shared_feed_forward_length(model.checkpoint.tensors[model.inside[first][name]].shape[1])
        writer.add_expert_shared_count(getattr(config, "n_shared_experts", 1))
    if architecture.leading:
        writer.add_leading_dense_block_count(first)
    if architecture.normed is None or architecture.routing:
        writer.add_expert_weights_norm(model.normed)
        writer.add_expert_weights_scale(float(getattr(config, "routed_scaling_factor", 1.0)))
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType[names.gating.upper()])
        groups, used = ((getattr(config, key, None) or 1) for key in ("n_group", "topk_group"))
        # Where all groups are open there are none for llama.cpp.
        writer.add_expert_group_count(groups if used < groups else 1)
        writer.add_expert_group_used_count(used if used < groups else 1)


def _sections(model: GgufModel, architecture: Architecture) -> list[int]:
    """How many frequencies time, height and width of a picture have; a text's tokens are at one place in all three."""
    stored = model.rope.get("mrope_section")
    if architecture.sections == "apart":
        # Left out, it is this one in the code.
        return stored or [16, 24, 24]
    thirds = [(model.rotated // 2 + 2 - direction) // 3 for direction in range(3)]
    # Past the last ones of height and width, a model has time again, and llama.cpp a place that is 0 for all tokens.
    return [max(pair) for pair in zip(thirds, stored or thirds, strict=False)]


def _add_rope(writer: GGUFWriter, model: GgufModel, architecture: Architecture) -> None:
    rope, kind = model.rope, model.kind
    if architecture.distances or not rope:
        return
    if not model.family.heads_by_layer_type:
        writer.add_rope_dimension_count(model.rotated)
    writer.add_rope_freq_base(rope["rope_theta"])
    if architecture.sections:
        writer.add_rope_dimension_sections([*_sections(model, architecture), 0])
    if around := model.config.rope_parameters.get("sliding_attention"):
        writer.add_rope_freq_base_swa(around["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    original = rope.get("original_max_position_embeddings") or model.config.max_position_embeddings
    if beta := rope.get("llama_4_scaling_beta"):
        writer.add_attn_temperature_scale(beta)
        writer.add_attn_temperature_length(original)
    if beta or kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(original)
    if kind not in ("yarn", "longrope"):
        return
    of = {"layer_type": "full_attention"} if rope is not model.config.rope_parameters else {}
    factor = float(ROPE_INIT_FUNCTIONS[kind](model.config, torch.device("cpu"), seq_len=1, **of)[1])
    writer.add_rope_scaling_type(RopeScalingType(kind))
    if kind == "yarn":
        writer.add_rope_scaling_factor(rope["factor"])
        # llama.cpp multiplies by this formula, and by the factor of the file.
        factor /= 0.1 * math.log(rope["factor"]) + 1
        for key in ("beta_fast", "beta_slow"):
            if rope.get(key) is not None:
                getattr(writer, f"add_rope_scaling_yarn_{key}")(rope[key])
        if model.family.latent is not None:
            # llama.cpp multiplies scores by its square, and rotated entries by nothing.
            writer.add_rope_scaling_yarn_log_mul(0.1 * (rope.get("mscale_all_dim") or 0.0))
            return
    writer.add_rope_scaling_attn_factors(factor)
