"""GGUF files that secateur reads itself, most of them mixtures of experts, give the source's weights and logits."""

import json
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import test_gguf
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from test_gguf import (  # noqa: F401
    CHANNELS,
    IDS,
    NARROW,
    SAMPLES,
    TEXT,
    UNIFORM,
    _cache,
    _llama_cpp,
    byte_level,
    cached_models,
    row,
    run,
    sentencepiece,
    tokens,
    uniform_keeps,
    with_the_table,
    write_out,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import models as tiny
from models import logits_of, relative
from outputs import assert_error
from secateur import open_checkpoint
from secateur.base.quiet import quiet
from secateur.checkpoints.checkpoint import Checkpoint
from secateur.families.registry import family_of
from secateur.gguf import file as gguf_file
from secateur.gguf.export import export
from secateur.gguf.file import readings
from secateur.gguf.splits import PRE_TOKENIZERS, split_rule
from secateur.gguf.tokenizer import vocabulary_of

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
MORE_ROWS = test_gguf.MORE_ROWS | {
    "mixtral wide": row("mixtral", **WIDE, num_key_value_heads=3, num_local_experts=4, num_experts_per_tok=2),
    "llama 1000": row("llama", num_key_value_heads=3, vocab_size=1000),
    "mixtral 1000": row("mixtral", num_key_value_heads=3, num_local_experts=4, num_experts_per_tok=2, vocab_size=1000),
    "gemma4_text 1000": row("gemma4_text", **tiny.GEMMA4 | {"vocab_size": 1000}),
    "gpt_oss wide": row("gpt_oss", **test_gguf.OSS | WIDE, rope_parameters=tiny.YARN),
}
MIXTURES = {name.split()[0] for name in tiny.MIXTURES} - {"gemma4_text"}
OF_EXPERTS = {name: kept for name, kept in UNIFORM.items() if name.split()[0] in MIXTURES or "mixture" in name}
# A model whose last blocks are twice as wide is written when it has been cut alone.
DENSE = {name: kept for name, kept in UNIFORM.items() if name not in OF_EXPERTS and name != "gemma4_text wide"}
READ_DENSE = {one.architecture for one in readings() if one.input.dense}
READ = OF_EXPERTS | {name: kept for name, kept in DENSE.items() if kept in READ_DENSE}
TWINS = {"glm4_moe_lite": "deepseek_v3", "solar_open": "glm4_moe"}
"""Families whose files are read as another family that computes the same."""
BLOCK = r"blk\.(\d+)\."

Made = Callable[[str], Path]
Change = Callable[[str, Any], "list[tuple[str, Any, GGMLQuantizationType]]"]
"""Returns the tensors that replace a tensor: name, bytes and type of each, from its name and values."""


def dense(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """A row's checkpoint, with a tokenizer that GGUF can hold."""
    tiny.save(name, folder, dtype)
    byte_level().save_pretrained(folder)
    return open_checkpoint(str(folder))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a row to a GGUF file with its model, made once; the checkpoint is beside it in `dense`."""
    place = tmp_path_factory.mktemp("made")

    @cache
    def file(name: str) -> Path:
        folder = place / name.replace(" ", "-")
        dense(name, folder / "dense")
        return export(folder / "dense", folder / "m.gguf", type="f32").path

    return file


def read(file: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    return open_checkpoint(str(file), dtype=dtype)


def rewritten(file: Path, changes: dict[str, Any]) -> Path:
    """Write a copy of a file with changed metadata (keys without architecture; None removes) and changed tensors."""
    reader = GGUFReader(file)
    path = file.with_name(f"other-{len(list(file.parent.iterdir()))}.gguf")
    architecture = changes.get("general.architecture", reader.fields["general.architecture"].contents())
    writer = GGUFWriter(path, architecture)
    facts = {
        key if key.startswith(("tokenizer.", "general.")) else f"{architecture}.{key}": value
        for key, value in changes.items()
        if not callable(value)
    }
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in facts and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for key, value in facts.items():
        if isinstance(value, list):
            writer.add_key_value(key, value, GGUFValueType.ARRAY, GGUFValueType[kinds[type(value[0])]])
        elif value is not None and key != "general.architecture":
            writer.add_key_value(key, value, GGUFValueType[kinds[type(value)]])
    for tensor in reader.tensors:
        own = [change for key, change in changes.items() if callable(change) and re.fullmatch(key, tensor.name)]
        kept = [(tensor.name, np.array(tensor.data), tensor.tensor_type)]
        for name, values, kind in own[0](tensor.name, np.array(tensor.data)) if own else kept:
            writer.add_tensor(name, np.ascontiguousarray(values), raw_dtype=kind)
    write_out(writer)
    return path


def plain(name: str, values: Any) -> tuple[str, Any, GGMLQuantizationType]:
    return name, values, GGMLQuantizationType.F32


def same(first: Checkpoint, second: Checkpoint) -> bool:
    """Whether two checkpoints hold the same tensors."""
    return first.tensors.keys() == second.tensors.keys() and all(
        torch.equal(first.read(stored), second.read(stored)) for stored in first.tensors
    )


def test_every_architecture_is_read():
    assert set(OF_EXPERTS.values()) == {one.architecture for one in readings() if one.gguf.gating}
    assert {kept for name, kept in READ.items() if name not in OF_EXPERTS} == READ_DENSE


@pytest.mark.parametrize("name", READ)
def test_reading_returns_what_was_written(tmp_path, name):
    """Weights have the names of checkpoints, and the config gives the same logits."""
    # Of a norm that is stored plus one, what has the digits of checkpoints comes back to the bit.
    dtype = torch.bfloat16 if family_of(tiny.config_of(name)).norm_offset else torch.float32
    source = dense(name, tmp_path / "dense", dtype)
    found = read(export(tmp_path / "dense", tmp_path / "m.gguf", type="f32").path, dtype)
    assert found.config.model_type == TWINS.get(name, source.config.model_type)
    # That architecture has an output matrix even where it is the embedding.
    assert same(found, source) or name == "minimax_m2 part"
    with quiet():
        again, exact = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            for folder in (found.path, tmp_path / "dense")
        )
    ids = tiny.token_rows(1, 60)
    assert torch.equal(logits_of(again, ids), logits_of(exact, ids))


@pytest.mark.parametrize(("name", "kind"), [("mixtral wide", "Q8_0"), ("gpt_oss wide", "MXFP4")])
def test_quantised_experts_are_read(made, name, kind, monkeypatch):
    """Experts are dequantised one by one, in pieces of any size."""
    file, type = made(name), GGMLQuantizationType[kind]
    packed: dict[str, Any] = {}

    def pack(name: str, values: Any) -> list[Any]:
        packed[name] = gguf.quantize(values, type)
        return [(name, packed[name], type)]

    def unpack(name: str, _: Any) -> list[Any]:
        return [plain(name, gguf.dequantize(packed[name], type))]

    pattern = BLOCK + r"ffn_.*_exps\.weight"
    with monkeypatch.context() as patched:
        patched.setattr(gguf_file, "_PIECE", 1000)
        quantised = read(rewritten(file, {pattern: pack}))
    assert same(quantised, read(rewritten(file, {pattern: unpack})))
    assert not same(quantised, read(file))


def test_layouts_of_other_converters(made):
    """Experts' gate and up in one tensor; keys and values in one; additional last blocks; no gating function."""
    file = made("deepseek_v3")
    exact, held = read(file), {tensor.name: np.array(tensor.data) for tensor in GGUFReader(file).tensors}

    def fused(name: str, values: Any) -> list[Any]:
        return [plain(name.replace("gate", "gate_up"), np.concatenate([values, held[name.replace("gate", "up")]], 1))]

    def latent(name: str, values: Any) -> list[Any]:
        both = np.concatenate([values.swapaxes(1, 2), held[name.replace("attn_k_b", "attn_v_b")]], 1)
        return [plain(name.replace("attn_k_b", "attn_kv_b"), both.reshape(-1, both.shape[2]))]

    sizes = {"attention.key_length_mla": None, "attention.value_length_mla": None}
    sizes |= {"attention.key_length": 12, "attention.value_length": 9}
    for changes in (
        {BLOCK + r"ffn_gate_exps\.weight": fused, BLOCK + r"ffn_up_exps\.weight": drop},
        sizes | {BLOCK + r"attn_k_b\.weight": latent, BLOCK + r"attn_v_b\.weight": drop},
        {"expert_gating_func": None},
        {"block_count": 4, "nextn_predict_layers": 1, r"output_norm\.weight": again_behind(3)},
    ):
        assert same(read(rewritten(file, changes)), exact)


def again_behind(block: int) -> Change:
    """An additional tensor, in a block of its own."""
    return lambda name, values: [plain(name, values), plain(f"blk.{block}.nextn.enorm.weight", values)]


def drop(name: str, values: Any) -> list[Any]:
    return []


def test_layouts_of_linear_attention_by_other_converters(made):
    """Converters also write an additional last block, no feed-forward width, and a list of linear blocks; older files
    hold queries, keys, values and gates in the order of checkpoints."""
    file = made("qwen3_5_moe_text even")
    changes: dict[str, Any] = {"block_count": 5, "nextn_predict_layers": 1, r"output_norm\.weight": again_behind(4)}
    changes |= dict.fromkeys(("feed_forward_length", "full_attention_interval", "expert_shared_count"))
    changes |= {"attention.recurrent_layers": [True, False] * 2 + [False]}
    assert same(read(rewritten(file, changes)), read(file))
    file = made("qwen3_next even")
    source = open_checkpoint(str(file.parent / "dense"))

    def fused(name: str, _: Any) -> list[Any]:
        block = name.split(".")[1]
        values = source.read(f"model.layers.{block}.linear_attn.in_proj_qkvz.weight")
        return [plain(f"blk.{block}.ssm_in.weight", values.numpy())]

    tensors = {BLOCK + r"attn_qkv\.weight": fused, BLOCK + r"attn_gate\.weight": drop}
    assert same(read(rewritten(file, tensors)), read(file))


def test_layouts_of_gemma4_by_other_converters(made):
    """Converters also write one number of heads for all blocks, and keys that no block attends with."""
    file = made("gemma4_text small")
    changes = {"attention.head_count": 6, "attention.head_count_kv": 2, "feed_forward_length": 72}

    def idle(name: str, values: Any) -> list[Any]:
        return [plain(name.replace("attn_q", f"attn_{letter}"), values) for letter in "qk"]

    assert same(read(rewritten(file, changes | {r"blk\.[23]\.attn_q(_norm)?\.weight": idle})), read(file))


def test_last_blocks_twice_as_wide(made):
    """The additional channels are read, and the logits stay the same where the channels add nothing."""
    file = made("gemma4_text small")

    def doubled(name: str, values: Any) -> list[Any]:
        down = "ffn_down" in name
        return [plain(name, np.concatenate([values, values * (not down)], 1 if down else 0))]

    found = read(rewritten(file, {r"blk\.[23]\.ffn_(gate|up|down)\.weight": doubled}))
    assert found.config.use_double_wide_mlp
    gate = found.read("model.layers.3.mlp.gate_proj.weight")
    assert len(gate) == 144
    assert torch.equal(gate[:72], gate[72:])
    with quiet():
        wide, narrow = (AutoModelForCausalLM.from_pretrained(one.path) for one in (found, read(file)))
    ids = tiny.token_rows(1, 60)
    assert relative(logits_of(wide, ids), logits_of(narrow, ids)) < 1e-6


def apart(name: str, values: Any) -> list[Any]:
    return [plain(name.replace("_exps", f".{expert}"), own) for expert, own in enumerate(values)]


def shorter(name: str, values: Any) -> list[Any]:
    return [plain(name, values[:, :-1])]


def twice(name: str, values: Any) -> list[Any]:
    return [plain(name, values), plain(name.replace("ffn_norm", "attn_post_norm"), values)]


def turning(name: str, values: Any) -> list[Any]:
    return [plain(name, np.linspace(1, 2, len(values), dtype=np.float32))]


WINDOWS = "attention.sliding_window_pattern"
QWEN35, GEMMA4, LATENT = "qwen3_5_moe_text even", "gemma4_text small", "deepseek_v3 scaled"
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "older files": ("qwen3_moe", {BLOCK + r"ffn_.*_exps\.weight": apart}, "blk.0.ffn_down_exps.weight is missing"),
    "half a block": (QWEN35, {r"blk\.1\.attn_k\.weight": drop}, "tensor blk.1.ssm_dt.bias is missing"),
    "another shape": (
        "qwen3_moe",
        {r"blk\.1\.ffn_up_exps\.weight": shorter},
        "[8, 39, 48], but the model needs [8, 40",
    ),
    "one tensor more": ("qwen3_moe", {r"blk\.1\.ffn_norm\.weight": twice}, "no place for tensor blk.1.attn_post_norm"),
    # transformers reads files without experts.
    "no tensor, dense": ("llama", {r"blk\.1\.ffn_norm\.weight": drop}, "post_attention_layernorm.weight in it"),
    "an unknown key": ("qwen3_moe", {"expert_group_scale": 0.5}, "key qwen3moe.expert_group_scale is not known"),
    "a key of others": ("qwen3_moe", {"expert_weights_scale": 2.5}, "does not support routed_scaling_factor = 2.5"),
    "too many blocks": ("qwen3_moe", {"block_count": 10**9}, "state 1,000,000,000 blocks, but it holds 39 t"),
    "too many at once": ("qwen3_moe", {"expert_used_count": 9}, "state 9 experts per token, but there are 8 experts"),
    "no length": ("qwen3_moe", {"context_length": None}, "the metadata key qwen3moe.context_length is missing"),
    "no multiplier": (LATENT, {"rope.scaling.yarn_log_multiplier": None}, "its yarn has no yarn_log_multiplier, so"),
    "scaled queries": (LATENT, {"attention.temperature_scale": 0.1}, "cannot scale queries with their positions, as"),
    "other gates": ("qwen3_moe", {"expert_gating_func": 2}, "expert_gating_func is not 1 (softmax), which qwen3_moe"),
    "another split": ("qwen3_moe", {"tokenizer.ggml.pre": "deepseek-llm"}, "not known to secateur: deepseek-llm"),
    # transformers would split its text as GPT-2 does.
    "another split, dense": ("llama", {"tokenizer.ggml.pre": "deepseek-llm"}, "not known to secateur: deepseek-llm"),
    "arctic": (
        "qwen3_moe",
        {"general.architecture": "arctic", "expert_count": 8},
        "architecture 'arctic' are not read",
    ),
    "other heads": (QWEN35, {"ssm.group_count": 3}, "ssm_conv1d.weight has the shape [60, 4], but the model needs [72"),
    "no whole groups": (QWEN35, {"ssm.group_count": 4}, "its linear attention has 6 value h"),
    "too many heads": (QWEN35, {"ssm.time_step_rank": 4 * 10**9}, "ssm.time_step_rank is a size that no tensor has"),
    "other factors": (GEMMA4, {r"rope_freqs\.weight": turning}, "its rotary factors (rope_freqs) are not like"),
    "no factors": (GEMMA4, {r"rope_freqs\.weight": drop}, "rotary factors (rope_freqs) are not like those of Gemma 4"),
    "no windows": (GEMMA4, {WINDOWS: [False] * 4}, "it needs both blocks with a sliding w"),
    "a window last": (
        GEMMA4,
        {WINDOWS: [True, False, False, True], "attention.shared_kv_layers": 0},
        "gemma4_text cannot have full attention and windows in the order that the file states",
    ),
    "heads block by block": (
        GEMMA4,
        {"attention.head_count": [6, 6, 6, 3]},
        "one num_attention_heads for all blocks, but",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_misread_are_refused(tmp_path, made, case):
    name, changes, message = REFUSED[case]
    file = rewritten(made(name), changes)
    assert_error(f"{re.escape(message)}.*; use the checkpoint that it was made from$", read, file)
    assert not cached_models()


def check_tokens(file: Path, tokenizer: Any, again: Any, bos: list[int], samples: Iterable[str]) -> None:
    """Check that the source's tokenizer, the one that was read, and llama.cpp give the same tokens."""
    for sample in samples:
        ids = again(sample).input_ids
        assert [*bos, *ids] == tokenizer(sample).input_ids == tokens(file, sample)


def file_with(tokenizer: Any, name: str, place: Path) -> Path:
    """A row's GGUF file with a tokenizer."""
    tiny.save(name, place / "dense")
    tokenizer.save_pretrained(place / "dense")
    return export(place / "dense", place / "m.gguf", type="f32").path


def test_tokenizer_of_gemma4(tmp_path):
    """Files name an algorithm of their own. llama.cpp puts BOS first; checkpoints leave that to chat templates."""
    tokenizer = sentencepiece(False)
    merges = [" ".join(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    facts = {"tokenizer.ggml.model": "gemma4", "tokenizer.ggml.pre": None, "tokenizer.ggml.merges": merges}
    file = rewritten(file_with(tokenizer, "gemma4_text 1000", tmp_path), facts)
    again = AutoTokenizer.from_pretrained(read(file).path)
    check_tokens(file, tokenizer, again, [1], (TEXT.rstrip(), "   12345  ", "ä€ x", "</s> the sea\n\n"))


@pytest.mark.parametrize("name", ["llama 1000", "mixtral 1000"])
@pytest.mark.parametrize("kind", ["bytes", "prefix", "no prefix"])
def test_text_becomes_the_same_tokens(tmp_path, name, kind):
    tokenizer = byte_level(size=300) if kind == "bytes" else sentencepiece(kind == "prefix")
    file, samples = file_with(tokenizer, name, tmp_path), (TEXT, "   12345  ", "ä€ x", "</s> the sea")
    again = AutoTokenizer.from_pretrained(read(file).path)
    check_tokens(file, tokenizer, again, [], samples)
    # The words of byte-level BPE have no umlaut.
    for sample in samples if kind != "bytes" else ():
        assert again.decode(again(sample).input_ids, skip_special_tokens=True) == sample.removeprefix("</s>")


@pytest.mark.parametrize("name", PRE_TOKENIZERS.values())
def test_pre_tokenizer_survives_writing_and_reading(tmp_path, name):
    """A model that was read from a file gets the same name of pre-tokenizer when it is written again."""
    tokenizer = byte_level(*split_rule(name), size=400)
    again = AutoTokenizer.from_pretrained(read(file_with(tokenizer, "mixtral 1000", tmp_path)).path)
    assert [again(sample).input_ids for sample in SAMPLES] == [tokenizer(sample).input_ids for sample in SAMPLES]
    assert vocabulary_of(again, 400).metadata["pre"] == name
