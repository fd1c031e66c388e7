"""Tiny random models, one row a case: every family, and the variants that its config allows.

Weights are random with activations of order one. Biases are not zero and norm weights are not one, so that a tensor
that is forgotten, swapped or shifted changes the logits.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from secateur.base.quiet import quiet
from secateur.base.services import Services
from secateur.checkpoints.checkpoint import open_checkpoint
from secateur.checkpoints.expert_matrices import whole
from secateur.families.registry import family_of
from secateur.fit.fitted_block import FittedBlock
from secateur.formats.format import PrunedModel, format_class
from secateur.model.axes import Width
from secateur.model.describe import describe
from secateur.model.per_layer import model_class
from secateur.model.stream import BlockStream
from secateur.model.structure import Block, KeptUnits, PrunableModule
from secateur.model.surgery import kept_inputs, narrow, slice_block, width_of
from secateur.model.units.channels import CHANNELS
from secateur.model.units.experts import EXPERT_CHANNELS, EXPERTS
from secateur.model.units.heads import HEADS_PER_GROUP, KV_GROUPS
from secateur.plan.problem import Plan
from secateur.write.slice import slice_fitted

VOCAB = 128
WORDS = 120
"""Number of tokens in the tokenizer's vocabulary, smaller than the model's."""
BOS, EOS, UNK, BREAK = 0, 1, 2, 3
POSITIONS = 64
LENGTH = 24
"""Length of a test row in tokens, longer than every sliding window in this file."""

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "intermediate_size": 72,
    "num_attention_heads": 6,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
WINDOWED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 7}


def _config(model_type: str, *without: str, **keys: Any) -> Callable[[], Any]:
    sizes = {key: value for key, value in SIZES.items() if key not in without}
    return lambda: AutoConfig.for_model(model_type, **copy.deepcopy(sizes | keys))


GROUPED = {"num_key_value_heads": 3}
TRIPLES = {"num_key_value_heads": 2}
GEMMA = {**TRIPLES, **WINDOWED, "head_dim": 12, "query_pre_attn_scalar": 10}
GEMMA4 = {
    **TRIPLES,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 7,
    "head_dim": 12,
    "global_head_dim": 16,
    "num_global_key_value_heads": 3,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
}
GEMMA4_SMALL = GEMMA4 | {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_global_key_value_heads": None,
    "attention_k_eq_v": False,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    "num_kv_shared_layers": 2,
}
"""Gemma 4 whose last blocks use keys and values of earlier ones, and whose blocks all have inputs of their own."""
WIDE4 = GEMMA4_SMALL | {"use_double_wide_mlp": True, "global_head_dim": 12}
"""Gemma 4 whose last blocks have feed-forwards of twice the width."""
OPT = {"ffn_dim": 96, "word_embed_proj_dim": 48}

ROWS: dict[str, Callable[[], Any]] = {
    "llama": _config("llama", **GROUPED),
    "mistral": _config("mistral", **GROUPED, head_dim=10, sliding_window=None),
    "qwen2": _config("qwen2", **TRIPLES),
    "qwen3": _config("qwen3", **GROUPED, head_dim=16),
    "gemma2": _config("gemma2", **GEMMA),
    "gemma3_text": _config("gemma3_text", **GEMMA),
    "olmo2": _config("olmo2", **GROUPED),
    "phi3": _config("phi3", **GROUPED, partial_rotary_factor=0.5),
    "opt": _config("opt", "intermediate_size", **OPT),
    "gpt2": _config("gpt2", "intermediate_size", n_inner=96),
    "gpt_neox": _config("gpt_neox", rotary_pct=0.5, intermediate_size=96),
    "llama biased": _config("llama", **TRIPLES, attention_bias=True, mlp_bias=True),
    "llama tied": _config("llama", **GROUPED, tie_word_embeddings=True),
    "llama one group": _config("llama", num_key_value_heads=1),
    "llama every head": _config("llama", num_key_value_heads=6, head_dim=12),
    "mistral window": _config("mistral", **TRIPLES, sliding_window=5),
    "qwen2 window": _config("qwen2", **GROUPED, sliding_window=6, use_sliding_window=True, max_window_layers=1),
    "qwen3 biased": _config("qwen3", **TRIPLES, head_dim=16, attention_bias=True, tie_word_embeddings=True),
    "gemma2 every head": _config("gemma2", **(GEMMA | {"num_key_value_heads": 6}), tie_word_embeddings=False),
    "gemma3 biased": _config("gemma3_text", **GEMMA, attention_bias=True),
    "phi3 wide": _config("phi3", **TRIPLES, head_dim=10, sliding_window=8),
    "opt after": _config("opt", "intermediate_size", **(OPT | {"word_embed_proj_dim": 32}), do_layer_norm_before=False),
    "gpt2 scaled": _config("gpt2", scale_attn_by_inverse_layer_idx=True),
    "gpt_neox serial": _config("gpt_neox", intermediate_size=80, use_parallel_residual=False, tie_word_embeddings=True),
}
"""Config of each case by its name. The name begins with the family's model type."""

STREAMED = (*ROWS, "gemma4_text small")
"""Rows whose blocks differ in how they are run one at a time."""

LINEAR: dict[str, Any] = {
    "head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 6,
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
CONV = {"layer_types": ["conv", "full_attention", "full_attention"]}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 6,
    "q_lora_rank": 20,
    "kv_lora_rank": 18,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 9,
}
GRANITE = {"residual_multiplier": 0.6, "attention_multiplier": 0.3, "embedding_multiplier": 1.5, "logits_scaling": 2.0}


def _falcon(**keys: Any) -> Callable[[], Any]:
    return _config("falcon", "intermediate_size", ffn_hidden_size=72, **keys)


SIMILAR: dict[str, Callable[[], Any]] = {
    "apertus": _config("apertus", **GROUPED, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "arcee": _config("arcee", **GROUPED),
    "arcee biased": _config("arcee", **TRIPLES, mlp_bias=True, attention_bias=True),
    "cohere": _config("cohere", **GROUPED, logit_scale=0.5),
    "cohere normed": _config("cohere", **GROUPED, use_qk_norm=True),
    "cohere2": _config("cohere2", **GROUPED, **WINDOWED, logit_scale=0.5, head_dim=8),
    "cwm": _config("cwm", **GROUPED, **WINDOWED, head_dim=12, rope_parameters=YARN),
    "ernie4_5": _config("ernie4_5", **GROUPED, head_dim=12, use_bias=True),
    "exaone4": _config("exaone4", **GROUPED, **WINDOWED),
    "bloom": _config("bloom", "intermediate_size"),
    "falcon": _falcon(),
    "falcon new": _falcon(num_kv_heads=2, new_decoder_architecture=True),
    "falcon biased": _falcon(multi_query=False, bias=True),
    "falcon old": _falcon(alibi=True, multi_query=False, parallel_attn=False, bias=True),
    "gemma": _config("gemma", **TRIPLES, head_dim=12),
    "gemma4_text": _config("gemma4_text", **GEMMA4),
    "gemma4_text small": _config("gemma4_text", "num_hidden_layers", **GEMMA4_SMALL),
    "gemma4_text wide": _config("gemma4_text", "num_hidden_layers", **WIDE4),
    "mpt": _config("mpt", "intermediate_size", max_seq_len=POSITIONS, attn_config={"clip_qkv": 1.5}),
    "glm": _config("glm", **GROUPED, head_dim=8),
    "glm4": _config("glm4", **TRIPLES, head_dim=8),
    "granite": _config("granite", **GROUPED, **GRANITE),
    "granite biased": _config("granite", **TRIPLES, attention_bias=True, mlp_bias=True, residual_multiplier=1.4),
    "helium": _config("helium", **GROUPED, head_dim=8),
    "hunyuan_v1_dense": _config("hunyuan_v1_dense", **GROUPED, head_dim=16),
    "jais2": _config("jais2", **GROUPED),
    # The class takes two thirds of block_ff_dim, rounded up: 72.
    "lfm2": _config("lfm2", **GROUPED, **CONV, block_ff_dim=100, block_multiple_of=8),
    "ministral": _config("ministral", **GROUPED, **WINDOWED, head_dim=12),
    "ministral3": _config(
        "ministral3", **GROUPED, head_dim=10, rope_parameters=YARN | {"llama_4_scaling_beta": 0.1, "mscale": 1.0}
    ),
    "nanochat": _config("nanochat", **GROUPED),
    "nemotron": _config("nemotron", **GROUPED, head_dim=8),
    "olmo": _config("olmo", **GROUPED, clip_qkv=1.5),
    "olmo3": _config("olmo3", **GROUPED, **WINDOWED),
    "phi": _config("phi", **GROUPED, partial_rotary_factor=0.5, qk_layernorm=True),
    "qwen3_5_text": _config("qwen3_5_text", **TRIPLES, **LINEAR),
    "seed_oss": _config("seed_oss", **GROUPED, head_dim=12),
    "smollm3": _config("smollm3", **GROUPED, no_rope_layers=[1, 0, 1]),
    "stablelm": _config("stablelm", **GROUPED, partial_rotary_factor=0.5, use_qkv_bias=True),
    "stablelm beside": _config("stablelm", **TRIPLES, use_parallel_residual=True, qk_layernorm=True),
    "starcoder2": _config("starcoder2", **GROUPED, sliding_window=7),
    "vaultgemma": _config("vaultgemma", **GEMMA),
    "persimmon": _config("persimmon"),
    "diffllama": _config("diffllama", **TRIPLES),
    "codegen": _config("codegen", "intermediate_size", "num_attention_heads", n_head=4, rotary_dim=4, n_inner=96),
    "bamba": _config(
        "bamba", **GROUPED, attn_layer_indices=[1, 2], mamba_n_heads=4, mamba_d_state=8, mamba_chunk_size=8
    ),
    "gptj": _config("gptj", "intermediate_size", rotary_dim=4, n_inner=96),
    # Youtu's class sets the padding token's embedding to zero whenever it loads.
    "youtu": _config("youtu", "pad_token_id", **LATENT),
    "youtu plain": _config(
        "youtu", "pad_token_id", **(LATENT | {"q_lora_rank": None}), attention_bias=True, rope_interleave=False
    ),
}
"""More families, without mechanisms that `ROWS` lack; they run through tests/steps/test_matrix.py only."""

_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
SHARED = {"shared_expert_intermediate_size": 28}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "first_k_dense_replace": 1}
PAIRED = ROUTED | {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
MISTRAL4 = LATENT | ROUTED | {"n_group": 2, "topk_group": 2, "rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}}
LLAMA4 = GROUPED | {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "head_dim": 12,
    "moe_layers": [1, 2],
    "intermediate_size_mlp": 64,
    "no_rope_layer_interval": 2,
    "attention_chunk_size": 7,
    "floor_scale": 5,
}
MIXTURES: dict[str, Callable[[], Any]] = {
    "dots1": _config("dots1", **GROUPED, **ROUTED, head_dim=12, n_shared_experts=1),
    "ernie4_5_moe": _config(
        "ernie4_5_moe",
        **GROUPED,
        moe_num_experts=8,
        moe_k=3,
        moe_intermediate_size=20,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
    ),
    "exaone_moe": _config(
        "exaone_moe",
        **GROUPED,
        **_EXPERTS,
        **WINDOWED,
        num_shared_experts=1,
        mlp_layer_types=["dense"] + ["sparse"] * 2,
    ),
    "flex_olmo": _config("flex_olmo", **GROUPED, num_experts=8, num_experts_per_tok=3),
    "gemma4_text mixture": _config("gemma4_text", **GEMMA4, **_EXPERTS, enable_moe_block=True, top_k_experts=3),
    "granitemoe": _config("granitemoe", **GROUPED, num_local_experts=8, num_experts_per_tok=3, residual_multiplier=0.6),
    "gpt_oss": _config("gpt_oss", **GROUPED, **WINDOWED, num_local_experts=8, num_experts_per_tok=3, head_dim=12),
    "hunyuan_v1_moe": _config("hunyuan_v1_moe", **GROUPED, num_experts=8, moe_topk=[3, 3, 3], head_dim=8),
    "phimoe": _config("phimoe", **GROUPED, num_local_experts=8, num_experts_per_tok=2, attention_bias=True),
    "qwen3_5_moe_text": _config("qwen3_5_moe_text", **TRIPLES, **_EXPERTS, **SHARED, **LINEAR),
    "qwen3_next": _config("qwen3_next", **TRIPLES, **_EXPERTS, **SHARED, **LINEAR),
    "deepseek_v2": _config(
        "deepseek_v2", **LATENT, **ROUTED, topk_method="group_limited_greedy", n_group=2, topk_group=2
    ),
    "deepseek_v3": _config("deepseek_v3", **LATENT, **ROUTED, n_group=2, topk_group=2),
    "deepseek_v3 plain": _config(
        "deepseek_v3", **(LATENT | {"q_lora_rank": None}), **ROUTED, n_group=1, topk_group=1, attention_bias=True
    ),
    "glm4_moe": _config("glm4_moe", **GROUPED, **ROUTED, head_dim=12, n_shared_experts=2, use_qk_norm=True),
    "glm4_moe groups": _config("glm4_moe", **TRIPLES, **PAIRED, head_dim=12),
    "glm4_moe_lite": _config(
        "glm4_moe_lite", **LATENT, **ROUTED, mlp_layer_types=["dense", "sparse", "sparse"], norm_topk_prob=True
    ),
    "lfm2_moe": _config("lfm2_moe", **GROUPED, **CONV, **_EXPERTS, num_dense_layers=1),
    "minimax_m2": _config("minimax_m2", **GROUPED, num_local_experts=8, num_experts_per_tok=3, head_dim=8),
    "mistral4": _config("mistral4", **MISTRAL4),
    "llama4_text": _config("llama4_text", **LLAMA4),
    "mixtral": _config("mixtral", **GROUPED, num_local_experts=6, num_experts_per_tok=2, head_dim=10),
    "olmoe": _config("olmoe", **GROUPED, num_experts=8, num_experts_per_tok=3),
    "qwen2_moe": _config("qwen2_moe", **TRIPLES, **_EXPERTS, **SHARED),
    "qwen2_moe some": _config("qwen2_moe", **GROUPED, **_EXPERTS, **SHARED, mlp_only_layers=[0], norm_topk_prob=True),
    "solar_open": _config("solar_open", "intermediate_size", **GROUPED, **ROUTED, head_dim=12, n_shared_experts=1),
    "qwen3_moe": _config("qwen3_moe", **GROUPED, **_EXPERTS, head_dim=16, norm_topk_prob=True),
}
"""Families with a mixture of experts in every block, or in every block but the first."""


@cache
def _made(row: Callable[[], Any]) -> Any:
    return row()


def config_of(name: str) -> Any:
    """Return the config of a row, which callers must not change. Test files may add rows under the same names."""
    config = _made((ROWS | SIMILAR | MIXTURES)[name])
    # As opened checkpoints have it.
    config.allow_global_per_layer_attribute_access = True
    if getattr(config, "attn_logit_softcapping", None):
        config._attn_implementation = "eager"
    return config


def build(name: str, seed: int = 0, **load: Any) -> nn.Module:
    """Return the model of a row in float32, with random weights that depend only on the seed."""
    with quiet(), torch.random.fork_rng():
        # Some vectors are drawn when they are made.
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config_of(name)), **load).float().eval()
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    transposed = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Conv1D)}
    persistent = model.state_dict()
    buffers = ((path, value) for path, value in model.named_buffers() if path in persistent and value.dim())
    for path, value in (*model.named_parameters(), *buffers):
        noise = torch.randn(value.shape, generator=generator)
        if value.dim() == 1:
            # Norms hold ones, or zeros where they add one themselves; biases hold zeros.
            value.add_(0.3 * noise)
        elif "embed" in path or "wte" in path or "wpe" in path:
            # Gemma scales its embeddings up.
            value.copy_(noise * (value.shape[1] ** -0.5 if "gemma" in name else 1.0))
        else:
            value.copy_(noise * value.shape[0 if path in transposed else -1] ** -0.5)
    return model


@cache
def dense(name: str) -> Any:
    """Return the model of a row, which callers must not change."""
    return build(name)


def token_rows(count: int = 4, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Return random token ids (count x length) without special tokens."""
    return torch.randint(4, WORDS, (count, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def relative(found: Tensor, wanted: Tensor) -> float:
    """Return the largest absolute difference, relative to the largest wanted value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def make_tokenizer(bos: bool = False, template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer with an id for each word (`w7` is 11) and for a blank line, which marks joins of texts."""
    words = {"<s>": BOS, "</s>": EOS, "<unk>": UNK, "\n\n": BREAK} | {f"w{i}": 4 + i for i in range(WORDS - 4)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=template,
        model_max_length=16,
    )


def make_letters() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer that a GGUF file can hold, with as many bytes as the vocabulary has room for."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:WORDS]
    words = {letter: i for i, letter in enumerate(letters)} | {"<s>": WORDS, "</s>": 121, "!!": 122}
    backend = Tokenizer(models.BPE(words, [("!", "!")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def begins(name: str) -> bool:
    """Return whether the tokenizer of a row's checkpoint adds BOS."""
    return " " in name


def parameters_in(tensors: dict[str, Tensor], blocks: Sequence[Block]) -> int:
    """Return the number of entries of tensors that are not buffers of the blocks."""
    # Checkpoints may keep a buffer in another module.
    buffers = {name.rpartition(".")[2] for block in blocks for name in block.buffers}
    return sum(tensor.numel() for name, tensor in tensors.items() if name.rpartition(".")[2] not in buffers)


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save the checkpoint of a row with a tokenizer, which adds BOS if the row's name has several words."""
    with quiet():
        model: Any = build(name).to(dtype)
        vars(model.config).pop("allow_global_per_layer_attribute_access")
        model.save_pretrained(folder)
        make_tokenizer(bos=begins(name)).save_pretrained(folder)
    return folder


def write_pruned(
    source: Path, out: Path, keeps: dict[int, KeptUnits], changed: Any = None, format: str | None = None, **how: Any
) -> int:
    """Write the kept units of each pruned block as `prune` does, without a fit; return the bytes of the weights.

    The default format is `stock`, or `hf` for what `stock` cannot hold. `changed` has changed tensors of each block.
    """
    stream = BlockStream(open_checkpoint(source))
    widths = {index: width_of(stream.blocks[index], keep) for index, keep in keeps.items()}
    if format is None:
        format = "hf" if format_class("stock")(stream).unsupported_plan(widths) else "stock"
    fitted = (FittedBlock(index, keeps[index], (changed or {}).get(index, {}), ()) for index in sorted(keeps))
    tensors = ((block.index, slice_fitted(stream, block, dtype=how.get("dtype"))) for block in fitted)
    pruned = PrunedModel(Plan(widths, 0.0, 0.0), tensors, {"secateur.json": {"secateur": "0"}}, overwrite=True)
    return format_class(format)(stream, **how).write(out, pruned)


def load_written(folder: Path, **how: Any) -> Any:
    """Return the model of a folder, after checking that its class has a place for every tensor and lacks none."""
    with quiet():
        config = open_checkpoint(folder).config
        if getattr(config, "attn_logit_softcapping", None):
            # Before transformers 5.22 its own choice leaves caps of attention out.
            how = {"attn_implementation": "eager"} | how
        how = {"dtype": torch.float32} | how
        model, info = model_class(config).from_pretrained(folder, output_loading_info=True, **how)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.requires_grad_(False).eval()


def opened(folder: Path) -> BlockStream:
    """Return the blocks of a folder, with so few tokens per batch that there are several batches."""
    return BlockStream(open_checkpoint(folder), services=Services(batch_tokens=50))


def layers_of(model: Any) -> list[nn.Module]:
    return list(model.get_submodule(family_of(model.config).blocks))


def seen(model: Any, index: int, path: str, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input and the output of a layer of a block, one row per token."""
    found: list[Any] = []
    layer = layers_of(model)[index].get_submodule(path)
    hook = layer.register_forward_hook(lambda _, args, output: found.extend((args[0], output)))
    logits_of(model, ids)
    hook.remove()
    x, y = (one[0] if isinstance(one, tuple) else one for one in found)
    return x.flatten(0, -2), y.flatten(0, -2)


def blocks_of(model: Any) -> list[Block]:
    return [describe(model.config, layer) for layer in layers_of(model)]


def reading(model: Any, index: int, kind: str) -> Tensor:
    """Return the root mean square of the gains of all norms after a module of a Gemma model (float64)."""
    norms = [norm for layer in layers_of(model) for norm in (layer.input_layernorm, layer.pre_feedforward_layernorm)]
    later = [*norms, model.model.norm][2 * index + 1 + (kind == "channels") :]
    return torch.stack([1 + norm.weight.double() for norm in later]).square().mean(0).sqrt()


def wide(groups: int, per_group: int, channels: int = 0, experts: int = 0) -> Width:
    """Return the width of a block; with experts, `channels` is the width of each expert."""
    fed = {EXPERTS: experts, EXPERT_CHANNELS: channels} if experts else {CHANNELS: channels}
    return Width({KV_GROUPS: groups, HEADS_PER_GROUP: per_group} | fed)


def own_axes(block: Block, width: Width) -> Width:
    """The width as far as a block has its axes and they can change."""
    return block.width | {axis.name: width[axis.name] for axis in block.axes if axis.name in width and not axis.locked}


def selected(heads: Sequence[int], channels: Sequence[int] | None = None, **others: Any) -> dict[str, tuple[int, ...]]:
    """Return the units that a block keeps, by kind."""
    named = {"heads": heads, **({} if channels is None else {"channels": channels}), **others}
    return {kind: tuple(units) for kind, units in named.items()}


def some_keep(block: Block, index: int, kinds: tuple[str, ...], axis: str) -> KeptUnits:
    """Return non-contiguous units that differ between blocks: 2/3 of the channels or experts, and some heads."""
    generator, attention, fed = torch.Generator().manual_seed(index), block.modules[0], block.modules[-1]

    def some(owners: Iterable[int], size: int, stay: int) -> list[int]:
        """Some units of each owner, whose units follow each other."""
        picks = [(owner, torch.randperm(size, generator=generator)[:stay].sort().values) for owner in owners]
        return [owner * size + int(unit) for owner, units in picks for unit in units]

    heads = list(range(attention.units))
    if "heads" in kinds and axis == KV_GROUPS and not attention.locked:
        heads = [head for head in heads if head // attention.per_group != index % attention.groups]
    elif "heads" in kinds and not attention.locked:
        heads = some(range(attention.groups), attention.per_group, attention.per_group - 1)
    kept = some(range(fed.groups), fed.per_group, fed.per_group * 2 // 3 if fed.kind in kinds else fed.per_group)
    found = {attention.kind: tuple(heads), fed.kind: tuple(kept)}
    if fed.kind == "experts" and "channels" in kinds:
        # Others of each expert, as many as kernels take.
        inside, stay = fed.units_inside, fed.units_inside * 2 // 24 * 8
        own, shared = some(kept, inside, stay), some([0], fed.shared_multiple * inside, fed.shared_multiple * stay)
        found["channels"] = (*own, *(fed.units * inside + unit for unit in shared))
    return found


def narrowed(model: Any, keeps: dict[int, KeptUnits], changed: dict[int, dict[str, Tensor]] | None = None) -> nn.Module:
    """Return a copy of a dense model without the units that `keeps` lacks, and with some changed tensors."""
    small = copy.deepcopy(model)
    for index, keep in keeps.items():
        layer = layers_of(small)[index]
        block = describe(model.config, layer)
        # They come in the dtype of the output.
        dtype = next(layer.parameters()).dtype
        own = {name: whole(value).to(dtype) for name, value in (changed or {}).get(index, {}).items()}
        tensors = layer.state_dict() | own
        narrow(layer, block, slice_block(block, tensors, keep), width_of(block, keep))
    return small


@contextmanager
def masked(model: nn.Module, keeps: dict[int, KeptUnits]) -> Iterator[None]:
    """Silence removed units: their entries in the input of the output projection become zero."""
    with silenced(layers_of(model), blocks_of(model), keeps):
        yield


@contextmanager
def silenced(layers: Sequence[nn.Module], blocks: Sequence[Block], keeps: dict[int, KeptUnits]) -> Iterator[None]:
    """Silence removed units of blocks that are not part of a causal language model."""
    with ExitStack() as undo:
        for index, keep in keeps.items():
            for module in blocks[index].modules_left:
                _silence(layers[index], module, keep, undo)
        yield


def _silence(layer: nn.Module, module: PrunableModule, keep: KeptUnits, undo: ExitStack) -> None:
    if module.kind == "experts":
        _silence_experts(layer, module, keep, undo)
        if keep.get("channels"):
            _silence_channels(layer, module, keep, undo)
        return
    mask = torch.zeros(module.units * module.size)
    mask[kept_inputs(module, keep[module.kind])] = 1
    hook = layer.get_submodule(module.output_layer).register_forward_pre_hook(lambda _, args: (args[0] * mask,))
    undo.callback(hook.remove)


def _silence_experts(layer: nn.Module, module: PrunableModule, keep: KeptUnits, undo: ExitStack) -> None:
    """Make the router give experts logits of minus infinity."""
    mixture: Any = layer if module.outer_norm else layer.get_submodule(module.output_layer)
    router = getattr(mixture, "gate", None) or mixture.router
    gone = [unit for unit in range(module.units) if unit not in keep["experts"]]
    tensors = [
        tensor
        for owner in (mixture, *router.modules())
        for tensor in (*owner._buffers.values(), *owner._parameters.values())
        if tensor is not None and module.units in tensor.shape
    ]
    weight = next(tensor for tensor in tensors if tensor.dim() == 2 and len(tensor) == module.units)
    for bias in (tensor for tensor in tensors if tensor is not weight):
        undo.callback(bias.copy_, bias.clone())
        bias[..., gone] = float("-inf")
    linear = nn.functional.linear

    def silent(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        y = linear(x, w, bias)
        if w.data_ptr() == weight.data_ptr() and w.shape == weight.shape:
            y[..., gone] = float("-inf")
        return y

    undo.callback(setattr, nn.functional, "linear", linear)
    nn.functional.linear = silent


def _silence_channels(layer: nn.Module, module: PrunableModule, keep: KeptUnits, undo: ExitStack) -> None:
    """Set the weights of channels of experts in the output projection to zero."""
    output, own = module.output_projection.name, module.units * module.units_inside
    axis = next(slab.axis for slab in module.slabs if slab.along == (EXPERT_CHANNELS,) and slab.name == output)
    every = torch.zeros(own + module.shared_multiple * module.units_inside)
    every[list(keep["channels"])] = 1
    mask = every[:own].view(module.units, module.units_inside)
    masks = {output: mask[:, None, :] if axis == 2 else mask[:, :, None]}
    masks |= {slab.name: every[own:] for slab in module.shared[-1:]}
    for name, part in masks.items():
        weight = layer.get_parameter(name)
        undo.callback(weight.data.copy_, weight.detach().clone())
        weight.data *= part
