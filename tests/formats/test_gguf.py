"""GGUF files in an unmodified llama.cpp compute the logits that transformers computes; other models are refused.

llama.cpp comes from the `llama-cpp-py-sync` wheel; its C interface is called as it is.
"""

import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from llama_cpp_py_sync import _cffi_bindings as bindings
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import models as tiny
import tiny_tokenizers
from models import LENGTH, blocks_of, build, logits_of, narrowed, relative, selected, some_keep, write_pruned
from outputs import assert_error, edited_weights
from secateur import BlockStream, open_checkpoint, prune
from secateur.base.cache import cache_folder
from secateur.base.quiet import quiet
from secateur.gguf import export as gguf_export
from secateur.gguf.export import Exported, export
from secateur.gguf.format import GgufFormat, gguf_byte_meter
from secateur.gguf.llama_cpp import _tensor_library, check_quantises, library
from secateur.gguf.positions import llama3_settings, read_rope
from secateur.gguf.source import folder_of
from secateur.gguf.splits import PRE_TOKENIZERS, SAME_RULE, split_rule
from secateur.gguf.tokenizer import vocabulary_of
from secateur.gguf.types import _input_storage
from secateur.gguf.write import add_vocabulary
from secateur.model.structure import KeptUnits
from secateur.model.surgery import width_of

ffi, lib = bindings.get_ffi(), bindings.get_lib()
log: list[str] = []

WIDE = {"hidden_size": 64, "num_key_value_heads": 2, "head_dim": 16}
DEEP = ["sliding_attention", "full_attention"]
FACTORS = {"short_factor": [1.1, 1.2, 1.3, 1.4], "long_factor": [2.1, 2.2, 2.3, 2.4]}
ROPES = {
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "yarn set": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.3,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
    },
    "longrope": {**FACTORS, "original_max_position_embeddings": 512},
}
KNOWN = {"llama": list(ROPES), "qwen2": list(ROPES), "phi3": ["longrope"], "gemma2": ["linear", "dynamic"]}
"""Rotary scalings that both transformers and llama.cpp support, by model type."""
YARN_ALL = {**tiny.YARN, "mscale": 0.7, "mscale_all_dim": 0.7}
OSS = {**tiny.GROUPED, **tiny.WINDOWED, "num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 12}
ONE_GROUP = {**tiny.ROUTED, "n_group": 1, "topk_group": 1}
TIED = {"tie_word_embeddings": True}
FULL = {"rope_type": "default", "rope_theta": 1e4}
SCALED4 = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16}
ALPHA = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0}
HUNYUAN = {**tiny.GROUPED, "num_experts": 8, "head_dim": 8}
FALCON = {"ffn_hidden_size": 72, "num_kv_heads": 3, "new_decoder_architecture": True}
WINDOWED4 = {"layer_types": (DEEP[:1] * 3 + DEEP[1:]) * 16, "sliding_window": 7, "num_hidden_layers": 64}
SECOND = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
LINEAR = {**tiny.TRIPLES, **tiny.LINEAR, **SECOND, "head_dim": 16, "linear_num_value_heads": 6}
FOURTH = {"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}
NEXT = {**LINEAR, **tiny.SHARED, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
SMALL4 = tiny.GEMMA4_SMALL
LFM2_MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "num_dense_layers": 1}
SCOUT = {
    **tiny.LLAMA4,
    "moe_layers": None,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "floor_scale": 8192,
    "num_hidden_layers": 5,
}


def row(model_type: str, **keys: Any) -> Any:
    """A row for `models.ROWS`, whose keys may also change sizes."""
    return lambda: AutoConfig.for_model(model_type, **{**tiny.SIZES, **keys})


MORE_ROWS = {
    "qwen3 tied": row("qwen3", **tiny.GROUPED, head_dim=16, tie_word_embeddings=True),
    "llama 64": row("llama", **WIDE, num_attention_heads=4),
    "mistral 64": row("mistral", **WIDE, sliding_window=None),
    "olmoe every head": row("olmoe", num_key_value_heads=6, num_experts=8, num_experts_per_tok=3),
    "exaone4 plain": row("exaone4", **tiny.GROUPED, sliding_window=None, layer_types=["full_attention"] * 3),
    "gpt_oss wide open": row("gpt_oss", **OSS | {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}),
    "smollm3 rotated": row("smollm3", **tiny.GROUPED, no_rope_layers=[1, 1, 1]),
    "gpt_oss plain": row("gpt_oss", **OSS, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "gpt_oss scaled": row("gpt_oss", **OSS, hidden_act="gelu", rope_parameters=tiny.YARN),
    "dots1 every head": row("dots1", num_key_value_heads=6, **tiny.ROUTED, head_dim=12, n_shared_experts=1),
    "deepseek_v2 greedy": row("deepseek_v2", **tiny.LATENT, **tiny.ROUTED),
    "deepseek_v3 scaled": row("deepseek_v3", **tiny.LATENT, **ONE_GROUP, rope_parameters=YARN_ALL),
    "deepseek_v3 queries": row(
        "deepseek_v3", **(tiny.LATENT | {"q_lora_rank": None}), **ONE_GROUP, num_hidden_layers=27
    ),
    "ministral3 plain": row("ministral3", **tiny.GROUPED, **TIED, head_dim=10, rope_parameters=FULL | SCALED4),
    "ministral3 odd": row(
        "ministral3", **tiny.TRIPLES, rope_parameters=tiny.YARN | SCALED4 | {"attention_factor": 1.3}, sliding_window=9
    ),
    "glm biased": row("glm", **tiny.TRIPLES, **TIED, head_dim=8, attention_bias=True),
    "cohere deep": row("cohere", **tiny.GROUPED, use_qk_norm=True, num_hidden_layers=64),
    "cohere2 open": row("cohere2", **tiny.GROUPED, layer_types=["full_attention"] * 3),
    "cohere2 closed": row("cohere2", **tiny.GROUPED, sliding_window=7, layer_types=["sliding_attention"] * 3),
    "nemotron biased": row("nemotron", **tiny.TRIPLES, **TIED, head_dim=8, attention_bias=True, mlp_bias=True),
    "jais2 every head": row("jais2", num_key_value_heads=6),
    "jais2 bare": row("jais2", **TIED, num_key_value_heads=6, attention_bias=False, mlp_bias=False),
    "stablelm plain": row("stablelm", **tiny.TRIPLES, **TIED, use_parallel_residual=True),
    "phi plain": row("phi", **tiny.GROUPED, partial_rotary_factor=0.5),
    "olmo open": row("olmo", **tiny.TRIPLES, **TIED),
    "olmo3 scaled": row(
        "olmo3",
        **tiny.GROUPED,
        **tiny.WINDOWED,
        **TIED,
        rope_parameters=dict(zip(DEEP, (FULL, tiny.YARN), strict=True)),
    ),
    "olmo3 apart": row(
        "olmo3", **tiny.GROUPED, **tiny.WINDOWED, rope_parameters={DEEP[0]: FULL | {"rope_theta": 500.0}, DEEP[1]: FULL}
    ),
    "hunyuan_v1_dense alpha": row("hunyuan_v1_dense", **tiny.GROUPED, head_dim=16, rope_parameters=ALPHA),
    "hunyuan_v1_moe alpha": row("hunyuan_v1_moe", **HUNYUAN, moe_topk=[3, 3, 3], rope_parameters=ALPHA),
    "hunyuan_v1_moe apart": row("hunyuan_v1_moe", **HUNYUAN, moe_topk=[3, 1, 3]),
    "olmoe clipped": row("olmoe", num_key_value_heads=6, num_experts=8, num_experts_per_tok=3, clip_qkv=0.3),
    "gemma3_text ahead": row("gemma3_text", **tiny.GEMMA, use_bidirectional_attention=True),
    "starcoder2 unbiased": row("starcoder2", **tiny.GROUPED, use_bias=False),
    "ernie4_5_moe alone": row(
        "ernie4_5_moe",
        **tiny.GROUPED,
        moe_num_experts=8,
        moe_k=3,
        moe_intermediate_size=20,
        moe_num_shared_experts=0,
        moe_layer_start_index=1,
    ),
    "exaone4 deep": row("exaone4", **tiny.GROUPED, **WINDOWED4),
    "falcon heads": row("falcon", ffn_hidden_size=72, multi_query=False),
    "falcon one norm": row("falcon", **FALCON, num_ln_in_parallel_attn=1, tie_word_embeddings=False),
    "falcon alibi": row("falcon", ffn_hidden_size=72, alibi=True),
    "bloom after": row("bloom", apply_residual_connection_post_layernorm=True),
    "mpt scaled": row("mpt", attn_config={"softmax_scale": 0.3}),
    "gemma4_text swapped": row("gemma4_text", **SMALL4 | {"layer_types": [*DEEP[::-1], *DEEP]}),
    "gemma4_text fewer": row("gemma4_text", **SMALL4 | {"vocab_size_per_layer_input": 64}),
    "gemma4_text open": row("gemma4_text", **tiny.GEMMA4 | {"layer_types": ["full_attention"] * 3}),
    "gemma4_text ahead": row("gemma4_text", **tiny.GEMMA4, use_bidirectional_attention="all"),
    "gemma4_text default": row("gemma4_text", **tiny.GEMMA4, rope_parameters=dict.fromkeys(DEEP, FULL)),
    "lfm2 untied": row(
        "lfm2", **tiny.TRIPLES, layer_types=[*DEEP[1:], "conv", "conv"], conv_L_cache=4, tie_word_embeddings=False
    ),
    "lfm2 without convolutions": row("lfm2", **tiny.GROUPED, layer_types=["full_attention"] * 3),
    "lfm2 without attention": row("lfm2", **tiny.GROUPED, layer_types=["conv"] * 3),
    "qwen3_5_text all full": row("qwen3_5_text", **LINEAR | {"layer_types": ["full_attention"] * 4}),
    "lfm2 biased": row("lfm2", **tiny.GROUPED, **tiny.CONV, conv_bias=True),
    "lfm2_moe unbiased": row("lfm2_moe", **tiny.GROUPED, **tiny.CONV, **LFM2_MOE, use_expert_bias=False),
    "qwen3_5_text even": row("qwen3_5_text", **LINEAR),
    "qwen3_5_text fourth": row("qwen3_5_text", **LINEAR | FOURTH, **TIED),
    "qwen3_5_text scaled": row(
        "qwen3_5_text", **LINEAR, rope_parameters=tiny.YARN | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    ),
    "qwen3_5_text first": row("qwen3_5_text", **LINEAR | {"layer_types": SECOND["layer_types"][::-1]}),
    "qwen3_5_text odd": row("qwen3_5_text", **LINEAR | {"linear_value_head_dim": 8}),
    "qwen3_5_moe_text even": row("qwen3_5_moe_text", **NEXT),
    "qwen3_next even": row("qwen3_next", **NEXT),
    "qwen3_next fourth": row("qwen3_next", **NEXT | FOURTH, **TIED),
    "qwen3_next gates": row("qwen3_next", **NEXT, norm_topk_prob=False),
    "minimax_m2 part": row(
        "minimax_m2",
        **tiny.TRIPLES,
        **TIED,
        num_local_experts=8,
        num_experts_per_tok=3,
        head_dim=8,
        rope_parameters=FULL | {"partial_rotary_factor": 0.5},
        # The class ignores these.
        n_group=2,
        topk_group=1,
        clip_qkv=0.1,
    ),
    "llama4_text scout": row("llama4_text", **SCOUT),
    "llama4_text 128": row("llama4_text", **SCOUT | {"num_local_experts": 128}),
    "apertus scaled": row(
        "apertus", **tiny.TRIPLES, **TIED, rope_parameters={**FULL, **ROPES["llama3"], "rope_type": "llama3"}
    ),
    "mistral4 scaled": row(
        "mistral4", **tiny.MISTRAL4 | {"rope_parameters": tiny.YARN | SCALED4 | {"mscale": 1.0, "mscale_all_dim": 1.0}}
    ),
    "mistral4 half": row("mistral4", **tiny.MISTRAL4 | {"rope_parameters": YARN_ALL | SCALED4}),
    "gemma4_text turned": row(
        "gemma4_text",
        **tiny.GEMMA4,
        final_logit_softcapping=5.0,
        rope_parameters={
            "sliding_attention": FULL | {"rope_theta": 500.0},
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.5,
                "rope_theta": 1e3,
                "factor": 3.0,
            },
        },
    ),
    # Windows, scales and caps differ from every default.
    "gemma2 odd": row(
        "gemma2",
        **{**tiny.GEMMA, "layer_types": ["full_attention"] * 3, "query_pre_attn_scalar": 3},
        final_logit_softcapping=5.0,
        attn_logit_softcapping=7.0,
    ),
    "gemma2 deep": row("gemma2", **{**tiny.GEMMA, "layer_types": DEEP * 23}, num_hidden_layers=46),
    "gemma3 deep": row("gemma3_text", **{**tiny.GEMMA, "layer_types": DEEP * 31}, num_hidden_layers=62),
    **{
        f"{kind} {name}": row(
            kind,
            **(tiny.GEMMA if kind == "gemma2" else tiny.GROUPED),
            max_position_embeddings=1024,
            rope_parameters={"rope_theta": 500.0, "rope_type": name.split()[0], **ROPES[name]},
        )
        for kind, names in KNOWN.items()
        for name in names
    },
}
"""Models that only these tests need."""


@ffi.callback("void(enum ggml_log_level, char *, void *)")
def _keep_log(level: int, text: Any, data: Any) -> None:
    log.append(ffi.string(text).decode(errors="replace"))


@pytest.fixture(scope="module", autouse=True)
def _llama_cpp() -> Iterator[None]:
    lib.llama_log_set(_keep_log, ffi.NULL)
    lib.llama_backend_init()
    yield
    lib.llama_log_set(ffi.NULL, ffi.NULL)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def cached_models() -> list[Path]:
    """Return the files in the cache that are no descriptions of classes."""
    return [entry for entry in cache_folder().rglob("*") if entry.is_file() and entry.parent.name != "classes"]


@contextmanager
def loaded(file: Path, **settings: Any) -> Iterator[Any]:
    parameters = lib.llama_model_default_params()
    for name, value in settings.items():
        setattr(parameters, name, value)
    log.clear()
    model = lib.llama_model_load_from_file(str(file).encode(), parameters)
    assert model != ffi.NULL, "".join(log[-8:])
    try:
        yield model
    finally:
        lib.llama_model_free(model)


def run(file: Path, ids: list[int], *, last: bool = False, room: int = 64) -> Tensor:
    """llama.cpp's logits of every token, or of the last one alone (1, vocabulary); one thread, a cache in float32."""
    with loaded(file) as model:
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = room
        parameters.n_threads = parameters.n_threads_batch = 1
        parameters.type_k = parameters.type_v = 0
        parameters.flash_attn_type = 0
        context = lib.llama_init_from_model(model, parameters)
        assert context != ffi.NULL, "".join(log[-8:])
        size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        batch = lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        wanted = [i for i in range(len(ids)) if not last or i == len(ids) - 1]
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
            batch.logits[i] = i in wanted
        try:
            assert lib.llama_decode(context, batch) == 0
            return torch.stack([torch.tensor(ffi.unpack(lib.llama_get_logits_ith(context, i), size)) for i in wanted])
        finally:
            lib.llama_batch_free(batch)
            lib.llama_free(context)


def tokens(file: Path, text: str) -> list[int]:
    """llama.cpp's ids of a text, with special tokens such as BOS."""
    with loaded(file, vocab_only=True) as model:
        raw = text.encode()
        room = ffi.new(f"llama_token[{len(raw) + 8}]")
        vocab = lib.llama_model_get_vocab(model)
        count = lib.llama_tokenize(vocab, raw, len(raw), room, len(raw) + 8, True, True)
        return [room[i] for i in range(count)]


TEXT = "It's 1984, isn't it?  We'LL take 12345 steps\n\n   to the sea; x+=1 ...\t(\"END\")\r\n"


def byte_level(steps: Any = None, whole_words: bool = False, size: int = tiny.VOCAB) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the characters of TEXT and a few merges."""
    backend = Tokenizer(models.BPE(ignore_merges=whole_words))
    backend.pre_tokenizer = steps or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size - 4, special_tokens=["<s>", "</s>"], show_progress=False)
    backend.train_from_iterator([TEXT, TEXT.lower(), "the sea takes the steps"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def write_folder(name: str, keeps: dict[int, KeptUnits], folder: Path, tokenizer: Any = None) -> Any:
    """Write a row's model, pruned, and return the model."""
    with tempfile.TemporaryDirectory() as source:
        tiny.save(name, Path(source))
        (tokenizer or byte_level()).save_pretrained(source)
        write_pruned(Path(source), folder, keeps)
    return narrowed(build(name), keeps)


IDS = tiny.token_rows(1).tolist()[0]


def with_the_table(small: Any) -> Any:
    """The model with llama.cpp's gelu, which reads values from a table in half precision."""
    for name, module in small.named_modules():
        if name.endswith("act_fn"):
            module.forward = lambda x: functional.gelu(x.half().float(), approximate="tanh").half().float()
    return small


def compare(small: Any, done: Exported) -> float:
    """Relative distance between llama.cpp's logits and transformers', over the positions that the file declares."""
    count = min(LENGTH, done.context)
    expected = logits_of(small, torch.tensor([IDS]))[0, :count]
    found = run(done.path, IDS[:count])
    assert torch.allclose(run(done.path, IDS[:count], last=True), found[-1:], atol=1e-5)
    return relative(found, expected)


BOTH, CHANNELS = ("heads", "channels"), ("channels",)
EXPERTS = ("experts",)
NARROW = ("experts", "channels")
"""Remove experts, and channels of dense blocks."""
ROWS_OF = {
    "apertus": ("apertus", "apertus scaled"),
    "arcee": ("arcee",),
    "bloom": ("bloom",),
    "chatglm": ("glm", "glm biased"),
    "cohere2": ("cohere2",),
    "command-r": ("cohere", "cohere deep"),
    "deepseek2": ("deepseek_v2 greedy", "deepseek_v3", "deepseek_v3 scaled", "deepseek_v3 queries", "youtu"),
    "dots1": ("dots1 every head",),
    "ernie4_5-moe": ("ernie4_5_moe", "ernie4_5_moe alone"),
    "exaone-moe": ("exaone_moe",),
    "exaone4": ("exaone4 plain", "exaone4 deep"),
    "falcon": ("falcon", "falcon new", "falcon heads", "falcon one norm"),
    "gemma": ("gemma",),
    "gemma2": ("gemma2", "gemma2 odd", "gemma2 deep", "gemma2 linear", "gemma2 dynamic"),
    "gemma3": ("gemma3_text", "gemma3 deep"),
    "gemma4": tuple(f"gemma4_text{variant}" for variant in ("", " small", " wide", " turned", " mixture")),
    "glm4": ("glm4",),
    "glm4moe": ("glm4_moe", "glm4_moe groups", "solar_open"),
    "gpt-oss": ("gpt_oss plain", "gpt_oss scaled"),
    "gpt2": ("gpt2", "gpt2 scaled"),
    "gptneox": ("gpt_neox", "gpt_neox serial"),
    "granite": ("granite", "granite biased"),
    "granitemoe": ("granitemoe",),
    "hunyuan-dense": ("hunyuan_v1_dense", "hunyuan_v1_dense alpha"),
    "hunyuan-moe": ("hunyuan_v1_moe", "hunyuan_v1_moe alpha"),
    "jais2": ("jais2 every head", "jais2 bare"),
    "lfm2": ("lfm2", "lfm2 untied"),
    "lfm2moe": ("lfm2_moe",),
    "llama": (
        *("llama", "llama biased", "llama tied", "llama one group", "llama every head", "mistral", "mistral window"),
        *("mistral 64", "qwen2 window", "qwen2 llama3", "qwen2 longrope", "phi3 wide", "cwm", "ernie4_5", "helium"),
        *("ministral", "seed_oss", "mixtral", *(f"llama {name}" for name in ROPES)),
    ),
    "llama4": ("llama4_text scout",),
    "minimax-m2": ("minimax_m2", "minimax_m2 part"),
    "mistral3": ("ministral3", "ministral3 plain", "ministral3 odd"),
    "mistral4": ("mistral4 scaled",),
    "mpt": ("mpt",),
    "nemotron": ("nemotron", "nemotron biased"),
    "olmo": ("olmo", "olmo open"),
    "olmo2": ("olmo2", "olmo3", "olmo3 scaled"),
    "olmoe": ("olmoe every head",),
    "phi2": ("phi plain",),
    "phi3": ("phi3", "phi3 longrope"),
    "qwen2": ("qwen2", "qwen2 linear", "qwen2 dynamic", "qwen2 yarn", "qwen2 yarn set"),
    "qwen2moe": ("qwen2_moe",),
    "qwen3": ("qwen3", "qwen3 tied"),
    "qwen35": ("qwen3_5_text even", "qwen3_5_text fourth", "qwen3_5_text scaled"),
    "qwen35moe": ("qwen3_5_moe_text even",),
    "qwen3moe": ("qwen3_moe",),
    "qwen3next": ("qwen3_next even", "qwen3_next fourth"),
    "smollm3": ("smollm3 rotated",),
    "starcoder2": ("starcoder2", "starcoder2 unbiased"),
    "stablelm": ("stablelm", "stablelm plain"),
}
"""Rows whose files have an architecture, when all blocks keep the same width."""
UNIFORM = {name: architecture for architecture, names in ROWS_OF.items() for name in names}
WITH_ALL_HEADS = {"bloom", "chatglm", "cohere2", "command-r", "exaone4", "falcon", "gemma4", "gpt2", "gptneox"}
WITH_ALL_HEADS |= {"granitemoe", "jais2", "lfm2", "lfm2moe", "minimax-m2", "mpt", "nemotron", "olmo", "olmo2", "olmoe"}
WITH_ALL_HEADS |= {"phi2", "phi3", "qwen2", "qwen2moe", "qwen35moe", "starcoder2", "stablelm"}
"""Architectures of rows of which no heads are removed: most derive the size of a head from the number of heads."""
WITH_WHOLE_EXPERTS = {"deepseek_v2 greedy", "deepseek_v3 scaled", "dots1 every head", "glm4_moe groups"}
WITH_WHOLE_EXPERTS |= {"mistral4 scaled"}
GELU = {"gemma", "gemma2", "gemma3", "gemma4", "gpt2", "gptneox", "starcoder2", "phi2", "falcon", "bloom", "mpt"}
"""Architectures with gelu, whose values llama.cpp reads from a table in half precision."""


def kinds_of(name: str) -> tuple[str, ...]:
    """Return the kinds of units that are removed from a row."""
    heads = () if UNIFORM[name] in WITH_ALL_HEADS or name == "llama one group" else ("heads",)
    return (*heads, "experts") if name in WITH_WHOLE_EXPERTS else (*heads, "experts", "channels")


def uniform_keeps(name: str, kinds: Any) -> dict[int, KeptUnits]:
    blocks = blocks_of(build(name))
    return {i: some_keep(block, i, kinds, block.modules[0].cut_axes[0].name) for i, block in enumerate(blocks)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Exported]]:
    """Return a function from a row of `UNIFORM` to its pruned model and its GGUF file in float32, each made once."""
    place = tmp_path_factory.mktemp("exported")

    @cache
    def make(name: str) -> tuple[Any, Exported]:
        folder = place / name.replace(" ", "-")
        small = write_folder(name, uniform_keeps(name, kinds_of(name)), folder)
        return small, export(folder, place / f"{len(list(place.iterdir()))}.gguf", type="f32")

    return make


@pytest.mark.parametrize("name", UNIFORM)
def test_llama_cpp_computes_models_of_uniform_widths(exported, name):
    small, done = exported(name)
    assert done.architecture == UNIFORM[name]
    if done.architecture == "gemma4":
        small = with_the_table(small)
    # Latent vectors are multiplied in another order, linear attention has another epsilon, rounding adds up in depth.
    looser = done.architecture in ("deepseek2", "mistral4", "nemotron", "qwen3next", "qwen35", "qwen35moe")
    bound = 1e-3 if done.architecture in GELU else 2e-5 if looser or "deep" in name else 2e-6
    # The deepest Gemmas, which llama.cpp recognises by their depth, scale attention scores otherwise.
    assert compare(small, done) < (5e-3 if name in ("gemma2 deep", "gemma3 deep") else bound)


@pytest.mark.parametrize("name", ["llama longrope", "qwen2 longrope", "phi3 longrope"])
def test_long_texts_have_other_rotary_factors(exported, name):
    """Beyond the original length both take the other factors, llama.cpp by the size of its cache."""
    small, done = exported(name)
    ids = tiny.token_rows(1, 560).tolist()[0]
    assert relative(run(done.path, ids, room=1024), logits_of(small, torch.tensor([ids]))[0]) < 2e-5


STRAIGHT = {
    "mixtral": NARROW,
    "glm4_moe": NARROW,
    "falcon new": CHANNELS,
    "lfm2_moe": NARROW,
    "qwen3_next even": NARROW,
    "qwen3_5_text fourth": CHANNELS,
    "gemma4_text mixture": NARROW,
}


@pytest.mark.parametrize(("name", "kinds"), STRAIGHT.items())
def test_pruning_straight_into_a_file(tmp_path, name, kinds):
    """The source stores experts one by one; the byte meter equals the size of the file."""
    folder = tiny.save(name, tmp_path / "dense", torch.float32)
    byte_level().save_pretrained(folder)
    stream = BlockStream(open_checkpoint(folder))
    keeps = uniform_keeps(name, kinds)
    plan = [{"block": i, **keep} for i, keep in keeps.items()]
    (tmp_path / "plan.json").write_text(json.dumps({"blocks": plan}))
    how = {"calibration": "random", "samples": 4, "length": 16, "plan": str(tmp_path / "plan.json")}
    prune(folder, tmp_path / "m.gguf", format="gguf", type="f32", **how)
    prune(folder, tmp_path / "m", format="stock", **how)
    bound = 1e-3 if "falcon" in name or "gemma4" in name else 2e-5 if name.startswith("qwen3_") else 2e-6
    model, file = AutoModelForCausalLM.from_pretrained(tmp_path / "m"), Exported(tmp_path / "m.gguf", 0, "", LENGTH)
    assert compare(model, file) < bound
    widths = {i: width_of(stream.blocks[i], keep) for i, keep in keeps.items()}
    stored = sum(tensor.n_bytes for tensor in GGUFReader(tmp_path / "m.gguf").tensors)
    assert gguf_byte_meter(stream, "f32").total(widths) == stored


def uneven(name: str, empty: bool) -> dict[int, KeptUnits]:
    """Widths that differ from block to block; with `empty`, the first block has neither heads nor channels."""
    blocks = blocks_of(build(name))
    per_group, groups = blocks[0].modules[0].per_group, blocks[0].modules[0].groups
    all_heads = tuple(range(groups * per_group))
    first = tuple(head for head in all_heads if head < per_group)
    without = tuple(head for head in all_heads if head >= per_group)
    heads = [first, all_heads, without]
    channels = [tuple(range(3, 40)), tuple(range(0, 71, 3)), tuple(range(72))]
    if empty:
        heads, channels = [(), without, ()], [(), (), tuple(range(1, 60))]
    return {i: selected(heads[i], channels[i]) for i in range(3)}


UNEVEN = ("llama", "mistral", "qwen2", "llama biased", "llama tied", "mistral window", "phi3 wide", "qwen3 tied", "cwm")
UNEVEN += ("ernie4_5", "helium", "seed_oss")


@pytest.mark.parametrize("empty", [False, True], ids=["some", "none"])
@pytest.mark.parametrize("name", UNEVEN)
def test_llama_cpp_computes_models_whose_blocks_differ(tmp_path, name, empty):
    small = write_folder(name, uneven(name, empty), tmp_path / "folder")
    done = export(tmp_path / "folder", tmp_path / "m.gguf", type="f32")
    assert done.architecture == ("openelm" if name == "qwen3 tied" else "deci")
    assert compare(small, done) < 2e-6


@pytest.mark.parametrize("name", ["gemma4_text", "gemma4_text small"])
def test_llama_cpp_computes_gemma_4_whose_channels_differ(tmp_path, name):
    blocks = blocks_of(build(name))
    kept = [range(3, 40), range(0, 71, 3), (), range(1, 60)]
    keeps = {i: selected(tuple(range(block.width.heads)), tuple(kept[i])) for i, block in enumerate(blocks)}
    small = write_folder(name, keeps, tmp_path / "folder")
    done = export(tmp_path / "folder", tmp_path / "m.gguf", type="f32")
    assert compare(with_the_table(small), done) < 1e-3


@pytest.mark.parametrize(("kind", "least", "bound"), [("q8_0", 1e-3, 0.03), ("q4_0", 1e-2, 0.3)])
def test_quantised_files_differ_by_rounding_only(tmp_path, kind, least, bound):
    """Filling up rows is exact: only rounded weights and llama.cpp's rounded activations differ from the model."""
    blocks, ids = blocks_of(build("llama 64")), torch.tensor([IDS])
    keeps = {i: selected(tuple(range(4)), tuple(range(0, 72, 2))[:33]) for i in range(len(blocks))}
    small = write_folder("llama 64", keeps, tmp_path / "folder")
    done = export(tmp_path / "folder", tmp_path / "m.gguf", type=kind)
    expected = logits_of(small, ids)
    with quiet():
        again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert again.config.intermediate_size == 64
    found = logits_of(again, ids)
    for name, value in again.state_dict().items():
        inside = tuple(map(slice, small.get_parameter(name).shape))
        small.get_parameter(name).data.copy_(value[inside])
        value[inside] = 0
        assert not value.any(), name
    rounded = logits_of(small, ids)
    assert relative(found, rounded) < 1e-6
    assert least / 10 < relative(rounded, expected) < bound
    assert relative(run(done.path, IDS), rounded[0]) < (0.03 if kind == "q8_0" else 0.1)


def test_a_file_with_unplanned_tensors_never_appears(tmp_path, monkeypatch):
    write_folder("llama", uniform_keeps("llama", CHANNELS), tmp_path / "folder")
    right = gguf_export.write_gguf

    def without_last(path, model, architecture, tensors, *rest, **named):
        right(path, model, architecture, tensors[:-1], *rest, **named)

    monkeypatch.setattr(gguf_export, "write_gguf", without_last)
    said = r"m.gguf: the written file was not as planned \(blk.2.\S+ is None, .*; report this as a bug"
    assert_error(said, export, tmp_path / "folder", tmp_path / "m.gguf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def write_out(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def vocabulary_file(tokenizer: Any, path: Path, **changes: str) -> Path:
    """A file with nothing but a tokenizer."""
    writer = GGUFWriter(path, "llama")
    words = vocabulary_of(tokenizer, len(tokenizer) + 3)
    words.metadata.update(changes)
    writer.add_name(words.safe_name(path.stem))
    add_vocabulary(writer, words)
    write_out(writer)
    return path


SAMPLES = [TEXT, "</s>the steps</s> of  the sea", "it's IT'S 12 123 1234", " a\n\n\nb\t\tc   ", "x(y)...z!?/\n/"]


@pytest.mark.parametrize("name", [*PRE_TOKENIZERS.values(), *SAME_RULE])
def test_byte_level_tokenizers(tmp_path, name):
    """The name is found by the rule, and llama.cpp splits by this rule under each of its names."""
    tokenizer = byte_level(*split_rule(name), size=400)
    assert vocabulary_of(tokenizer, 400).metadata["pre"] == SAME_RULE.get(name, name)
    file = vocabulary_file(tokenizer, tmp_path / "t.gguf", pre=name)
    assert GGUFReader(file).fields["tokenizer.ggml.pre"].contents() == name
    for sample in SAMPLES:
        assert tokens(file, sample) == tokenizer(sample).input_ids


def sentencepiece(prefix: bool) -> PreTrainedTokenizerFast:
    """SentencePiece BPE with a space in front of a text, as in Llama 2, or without, as in Gemma."""
    backend = tiny_tokenizers.llama2() if prefix else tiny_tokenizers.gemma()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, chat_template="{{ messages }}")


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizers(tmp_path, prefix):
    tokenizer = sentencepiece(prefix)
    tokenizer.add_tokens(["▁▁▁▁"] if prefix else ["\n\n"])
    file = vocabulary_file(tokenizer, tmp_path / "t.gguf")
    for sample in ("the sea takes IT'S steps", "ä€ x", "   12345  ", "steps\n\nsteps"):
        assert tokens(file, sample) == tokenizer(sample).input_ids
    fields = GGUFReader(file).fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    assert fields["tokenizer.ggml.token_type"].contents()[:5] == [2, 3, 3, 3, 6]
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert fields["tokenizer.ggml.add_eos_token"].contents() is False


READ = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "llama tied", "llama one group"]
READ += ["mistral", "mistral window", "phi3 wide", "gpt2 scaled", "qwen3 tied"]
READ += ["gemma2 deep", "gemma2 odd", "starcoder2", "stablelm", "stablelm plain", "nemotron", "lfm2"]
READ += [name for name in UNIFORM if name.split()[-1] in ("linear", "dynamic", "yarn", "set", "longrope", "llama3")]
NOT_READ = {
    "llama biased": "transformers reads only 42,576 of its 43,272 weights, without the biases; use the checkp",
    "nemotron biased": "transformers reads only 45,216 of its 45,888 weights, without the biases; use the che",
    "mistral 64": "transformers cannot load it (Class validation error",
    "olmo2": "transformers cannot read the architecture 'olmo2' from GGUF; use the checkpoint that it was made from",
}


@pytest.mark.parametrize("name", [name for name in READ if name not in {*NOT_READ, "qwen2 llama3", "qwen2 longrope"}])
def test_transformers_reads_what_llama_cpp_computes(exported, name):
    """Rotary settings, windows, scales and caps, which transformers leaves out, are read as well."""
    _, done = exported(name)
    with quiet():
        again = AutoModelForCausalLM.from_pretrained(folder_of(done.path, torch.float32))
    ids = tiny.token_rows(1, 60).tolist()[0]
    # llama.cpp has another gelu, and with depth it shows.
    bound = 5e-3 if "deep" in name else 1e-3 if done.architecture in GELU else 5e-6
    assert relative(run(done.path, ids), logits_of(again, torch.tensor([ids]))[0]) < bound


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, {}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
        ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.dimension_count": 4}, {"partial_rotary_factor": 0.5}),
    ],
    ids=["nothing", "none", "an old name", "no kind", "a part of a head"],
)
def test_reading_rotary_scaling(facts, expected):
    config = tiny.ROWS["llama"]()
    before = dict(config.rope_parameters)
    read_rope(config, facts, {})
    assert config.rope_parameters == before | expected
    assert_error("its rotary scaling 'other' is not known", read_rope, config, {"rope.scaling.type": "other"}, {})


@pytest.mark.parametrize("name", NOT_READ)
def test_files_that_transformers_cannot_read(exported, tmp_path, name):
    _, done = exported(name)
    assert_error(re.escape(f"gguf: {NOT_READ[name]}"), folder_of, done.path, torch.float32)
    assert not cached_models()


@pytest.mark.parametrize(
    ("factor", "theta", "size", "original"), [(8.0, 5e5, 128, 8192), (32.0, 5e5, 64, 8192), (4.0, 1e4, 128, 2048)]
)
def test_llama3_settings_from_rotary_factors(factor, theta, size, original):
    """Settings of Llama 3.1, of Llama 3.2 and of another model are found; other factors are refused."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, size, 2) / size)
    share = np.clip((original / wavelengths - 1) / 3, 0, 1)
    factors = 1 / ((1 - share) / factor + share)
    assert llama3_settings(factors.astype(np.float32).astype(float), theta, size) == {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    for wrong in (factors[::-1], np.ones_like(factors), factors[:-1], factors + np.linspace(0, 1, len(factors))):
        assert_error(r"factors \(rope_freqs\) are not like those of Llama 3.1", llama3_settings, wrong, theta, size)


def test_names_that_readers_would_take_for_another_model(tmp_path):
    """llama.cpp expects Phi-3's tokens in a file whose model is named so."""
    write_folder("llama", uniform_keeps("llama", CHANNELS), tmp_path / "folder")
    for name, stored in (("my-Phi-3b", "pruned"), ("mistral", "pruned"), ("mine", "mine")):
        done = export(tmp_path / "folder", tmp_path / f"{name}.gguf", type="f32")
        assert GGUFReader(done.path).fields["general.name"].contents() == stored
        assert run(done.path, IDS).isfinite().all()


def test_tokens_that_remove_spaces(tmp_path):
    """Tokens that remove spaces as Phi-3's do are supported; others are refused."""
    tokenizer = byte_level()
    plain = [AddedToken(word, special=True) for word in ("<unk>", "<s>", "<|endoftext|>")]
    strips = [AddedToken(word, special=True, rstrip=True) for word in ("<|user|>", "</s>")]
    tokenizer.add_tokens([*plain, *strips], special_tokens=True)
    text = "<s>  the <|user|>  \n the steps</s>  <|endoftext|>  of"
    assert tokens(vocabulary_file(tokenizer, tmp_path / "t.gguf"), text) == tokenizer(text).input_ids
    said = r"the tokenizer's <\|user\|> removes spaces around it or depends on the words around it"
    for how in ("rstrip", "lstrip", "single_word"):
        tokenizer = byte_level()
        tokenizer.add_tokens([AddedToken("<|user|>", special=True, **{how: True})], special_tokens=True)
        assert_error(said, vocabulary_of, tokenizer, len(tokenizer))


REFUSED = {
    "opt": (CHANNELS, "llama.cpp has no architecture for opt; keep the safetensors folder"),
    "qwen3 biased": (BOTH, "qwen3 has no place for the biases of attn_output; openelm has no place for"),
    "gemma2 every head": (CHANNELS, "gemma2 uses the embedding as its output matrix"),
    "deepseek_v2": (EXPERTS, "deepseek2 chooses groups of experts by their best two experts, and this"),
    "youtu plain": (BOTH, "and needs a latent vector for queries too .* and rotates neighbouring entries of a head"),
    "smollm3": (BOTH, "smollm3 leaves positions out in every fourth block"),
    "exaone4": (CHANNELS, "exaone4 has windows in models of 64 blocks, and in no others"),
    "cohere normed": (CHANNELS, "command-r normalises queries and keys in models of 64 blocks and more"),
    "cohere2 open": (CHANNELS, "cohere2 has windows in some blocks, and rotates only in these"),
    "cohere2 closed": (CHANNELS, "cohere2 supports windows only where blocks without a window lie at"),
    "glm": (BOTH, "chatglm needs heads x head size = 48, so all 6 heads"),
    "jais2": (CHANNELS, "jais2 needs as many key/value heads as query heads"),
    "stablelm beside": (CHANNELS, "stablelm has no norms of queries and keys"),
    "olmo3 apart": (CHANNELS, "olmo2 rotates with one base \\(rope_theta\\) in all blocks"),
    "falcon alibi": (CHANNELS, "falcon needs rotary positions, and attention and feed-forward in parallel"),
    "bloom after": (CHANNELS, "bloom adds outputs to a residual stream that is not normalised"),
    "qwen3_5_text": (CHANNELS, "qwen35 rotates entries of a head in pairs, but 3 rotate here"),
    "qwen3_5_text first": (CHANNELS, "qwen35 has full attention at regular distances, and linear attention before"),
    "qwen3_5_text odd": (CHANNELS, "qwen35 needs keys and values of linear attention to have one size"),
    "qwen3_next gates": (EXPERTS, "qwen3next divides the gates of experts by their sum"),
    "phimoe": (EXPERTS, "llama.cpp's phimoe normalises without subtracting the mean, and divides gates by .*, unlike"),
    "gemma4_text swapped": (CHANNELS, "gemma4 takes shared keys and values from two blocks, first one with a window"),
    "gemma4_text fewer": (CHANNELS, "gemma4 reads per-layer inputs for all tokens"),
    "gemma4_text open": (CHANNELS, "gemma4 needs windows in some blocks"),
    "gemma4_text default": (CHANNELS, "gemma4 does not support default rotary scaling"),
    "gemma4_text ahead": (CHANNELS, "gemma4 attends to earlier tokens only"),
    **dict.fromkeys(
        ("lfm2 without convolutions", "lfm2 without attention", "qwen3_5_text all full"),
        (CHANNELS, "needs blocks with attention, and blocks with a convolution or linear attention"),
    ),
    "lfm2 biased": (CHANNELS, "lfm2 has no place for the biases of convolutions"),
    "lfm2_moe unbiased": (EXPERTS, "lfm2moe needs a bias on the choice of experts"),
    "mpt scaled": (CHANNELS, "mpt computes the scale of attention scores from the head size"),
    "llama4_text": (EXPERTS, "llama4 needs experts in all blocks or in none"),
    "llama4_text 128": ((), "llama4 computes with use_qk_norm = False only"),
    "mistral4": (EXPERTS, "mistral4 needs yarn's mscale and mscale_all_dim to be the same number"),
    "mistral4 half": (EXPERTS, "mistral4 needs yarn's mscale to be 1"),
    "hunyuan_v1_moe apart": (EXPERTS, "hunyuan-moe needs the same number of experts per token in all blocks"),
    "olmoe clipped": (EXPERTS, "olmoe does not clip queries, keys and values"),
    "gemma3_text ahead": (CHANNELS, "gemma3 attends to earlier tokens only"),
    "gpt_oss": (EXPERTS, "gpt-oss rounds the limits of yarn; set truncate to true in config.json"),
    "gpt_oss wide open": (EXPERTS, "and has a window in every other block, beginning with the first"),
    "phi3": (BOTH, "phi3 needs heads x head size = 48, so all 6 heads; llama rotates whole heads, but 4 of 8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_llama_cpp_lacks_are_refused(tmp_path, name):
    kinds, message = REFUSED[name]
    write_folder(name, uniform_keeps(name, kinds), tmp_path / "folder")
    assert_error(f"folder: .*{message}", export, tmp_path / "folder", tmp_path / "m.gguf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_wrong_types_and_names_are_refused(tmp_path):
    folder, out = tmp_path / "folder", tmp_path / "m.gguf"
    write_folder("llama", uniform_keeps("llama", BOTH), folder)
    assert_error("no type 'int8'; choose one of f32, f16, bf16, q8_0, q4_0, q2_k", export, folder, out, type="int8")
    assert_error(r"the file name must end in \.gguf; rename it", export, folder, tmp_path / "m.bin")
    out.write_text("mine")
    assert_error("exists; choose another name", export, folder, out)
    assert_error("not overwritten, because it is not a gguf file", export, folder, out, overwrite=True)
    assert out.read_text() == "mine"
    out.write_text("GGUF")
    export(folder, out, overwrite=True)
    with edited_weights(folder) as tensors:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    said = r"blk.1.ffn_up.weight has weights that are too large for f16; use bf16"
    assert_error(said, export, folder, tmp_path / "n.gguf", type="f16")


def test_the_library_makes_its_own_types(tmp_path, monkeypatch):
    """Rows of these widths fill no block of 256, so the library chooses similar types with smaller blocks."""
    write_folder("llama", uniform_keeps("llama", BOTH), tmp_path / "folder")
    plain, quantised = (export(tmp_path / "folder", tmp_path / f"{one}.gguf", type=one) for one in ("f32", "q6_k"))
    assert quantised.bytes < plain.bytes
    names = [GGUFReader(one.path).fields["general.name"].contents() for one in (plain, quantised)]
    assert names == ["f32", "q6_k"]
    ids = tiny.token_rows(1, 20).tolist()[0]
    assert 0 < relative(run(quantised.path, ids), run(plain.path, ids)) < 0.2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["f32.gguf", "folder", "q6_k.gguf"]
    monkeypatch.setitem(sys.modules, "llama_cpp_py_sync", None)
    library.cache_clear()
    said = r"library is not installed; pip install 'secateur\[llama\]'"
    assert_error(said, export, tmp_path / "folder", tmp_path / "other.gguf", type="q4_k_m")
    assert_error(said, GgufFormat.check_type, "q4_k_m")
    assert not (tmp_path / "other.gguf").exists()
    library.cache_clear()


def test_types_as_in_the_input(tmp_path, monkeypatch):
    """One of two blocks is pruned, to a number of channels that fills blocks of 32 weights but none of 256."""
    config = LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    tiny.make_letters().save_pretrained(tmp_path / "dense")
    source = export(tmp_path / "dense", tmp_path / "input.gguf", type="q4_k_m").path
    options = {"calibration": "random", "samples": 4, "length": 8, "recovery": "none", "round": 32}
    prune(source, tmp_path / "out", sparsity=0.2, blocks="0:1", modules=("channels",), **options)
    exact, done = (export(tmp_path / "out", tmp_path / f"{one}.gguf", type=one).path for one in ("bf16", "as-input"))
    before, after = ({tensor.name: tensor for tensor in GGUFReader(file).tensors} for file in (source, done))
    assert {one.tensor_type.name for one in before.values()} == {"F32", "Q4_K", "Q6_K"}
    for name, tensor in after.items():
        if "blk.0.ffn" not in name:
            assert tensor.data.tobytes() == before[name].data.tobytes(), name
        elif "ffn_down.weight" not in name:
            assert tensor.tensor_type == before[name].tensor_type
    smaller = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}[before["blk.0.ffn_down.weight"].tensor_type.name]
    assert after["blk.0.ffn_down.weight"].tensor_type.name == smaller
    ids = tiny.token_rows(1, 20).tolist()[0]
    assert relative(run(done, ids), run(exact, ids)) < 0.2
    assert {file.name for file in tmp_path.glob("*.gguf")} == {"as-input.gguf", "bf16.gguf", "input.gguf"}
    (tmp_path / "direct").mkdir()
    direct = tmp_path / "direct" / "as-input.gguf"
    summary = prune(
        source, direct, sparsity=0.2, blocks="0:1", modules=("channels",), format="gguf", type="as-input", **options
    )
    assert direct.read_bytes() == done.read_bytes()
    assert summary.bytes == tuple(sum(int(one.n_bytes) for one in file.values()) for file in (before, after))
    other = tmp_path / "other.gguf"
    assert_error("this one comes from no such file; choose", export, tmp_path / "dense", other, type="as-input")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "llama_cpp_py_sync", None)
        clear_caches(library, _tensor_library, check_quantises, _input_storage)
        said = r"input\.gguf: .* is q\d_k: llama\.cpp's library .* pip install"
        assert_error(said, export, tmp_path / "out", other, type="as-input")
    clear_caches(library)
    source.rename(tmp_path / "moved.gguf")
    assert_error(r"but .*input\.gguf is not there; put it back", export, tmp_path / "out", other, type="as-input")
    assert not other.exists()


def clear_caches(*functions: Any) -> None:
    for function in functions:
        function.cache_clear()


def test_tokenizers_that_llama_cpp_lacks_are_refused(tmp_path):
    steps = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    for tokenizer, message in (
        (tiny.make_tokenizer(), "folder: the tokenizer is WordLevel"),
        (byte_level(steps), "does not know what llama.cpp calls the rule"),
    ):
        write_folder("llama", uniform_keeps("llama", BOTH), tmp_path / "folder", tokenizer)
        assert_error(message, export, tmp_path / "folder", tmp_path / "m.gguf")
    tokenizer = byte_level()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"] = []
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    assert_error("the tokenizer has no merges, and llama", vocabulary_of, bare, len(bare))
