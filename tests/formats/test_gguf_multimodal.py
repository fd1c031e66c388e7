"""GGUF files with the language model of a multimodal checkpoint compute the logits of the whole model for a text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_gguf
import test_multimodal
import torch
from gguf import GGUFReader, GGUFWriter
from llama_cpp_py_sync._cffi_bindings import get_mtmd_lib
from safetensors.torch import load_file, save_file
from test_gguf import (  # noqa: F401
    GELU,
    IDS,
    TEXT,
    _llama_cpp,
    byte_level,
    ffi,
    lib,
    loaded,
    log,
    run,
    tokens,
    with_the_table,
    write_out,
)
from test_multimodal import CASES, IMAGE, SMALL, TURNED, VISION, _llama4, opened, save, turned  # noqa: F401
from torch import Tensor

import models as tiny
from models import SIZES, relative
from outputs import Notes, assert_error
from secateur import open_checkpoint, prune
from secateur.commands import doctor
from secateur.gguf.architectures import gguf_unsupported
from secateur.gguf.export import DECODER_ONLY, export
from secateur.model.kinds import KINDS
from secateur.model.per_layer import widths_of


def around(case: str, text: dict[str, Any], **keys: Any) -> tuple[str, dict[str, Any]]:
    """A case of `test_multimodal` with another language model inside."""
    kind, whole = CASES[case]
    return kind, whole | {"text_config": SIZES | text} | keys


def qwen(case: str, rope: dict[str, Any] | None = None, **keys: Any) -> tuple[str, dict[str, Any]]:
    """A case of Qwen's with other settings, and a tiny epsilon of norms, since llama.cpp b11739 ignores qwen2vl's."""
    text = CASES[case][1]["text_config"]
    return around(case, text | {"rms_norm_eps": 1e-12, "rope_parameters": TURNED | (rope or {})} | keys)


def merging(case: str, **keys: Any) -> tuple[str, dict[str, Any]]:
    """A case of Qwen's whose tower takes two pictures at once and makes one token of four patches, as llama.cpp's."""
    kind, whole = qwen(case, **keys)
    tower = {"spatial_merge_size": 2, "temporal_patch_size": 2}
    tower |= {"num_position_embeddings": 64} if kind.startswith("qwen3") else {}
    return kind, whole | {"vision_config": whole["vision_config"] | tower}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ROPE = test_gguf.FULL | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5 even": around("qwen3_5", test_gguf.LINEAR | {"model_type": "qwen3_5_text", "rope_parameters": ROPE}),
    "mistral3 plain": around(
        "mistral3",
        tiny.GROUPED
        | {"model_type": "ministral3", "head_dim": 10, "rope_parameters": test_gguf.FULL | test_gguf.SCALED4},
        tie_word_embeddings=True,
    ),
    "qwen2_vl": qwen("qwen2_vl"),
    "qwen2_5_vl": qwen("qwen2_5_vl"),
    "qwen2_5_vl yarn": qwen("qwen2_5_vl", YARN),
    "qwen3_vl yarn": qwen("qwen3_vl", YARN),
    # Of another width than the one whose direction cannot be told.
    "qwen3_vl_moe": qwen("qwen3_vl_moe", moe_intermediate_size=20),
    "qwen2_vl merging": merging("qwen2_vl"),
    "qwen3_vl merging": merging("qwen3_vl"),
    "qwen3_vl_moe merging": merging("qwen3_vl_moe", moe_intermediate_size=20),
    # Height and width have no frequencies, and every third one would be theirs.
    "qwen3_5 time": around(
        "qwen3_5",
        test_gguf.LINEAR | {"model_type": "qwen3_5_text", "rope_parameters": ROPE | {"mrope_section": [4, 0, 0]}},
    ),
    "llava qwen2": around("llava", tiny.GROUPED | {"model_type": "qwen2"}),
    # What the whole model says of its output matrix holds.
    "llava tied inside": around("llava", tiny.TRIPLES | {"model_type": "llama", "tie_word_embeddings": True}),
    "lfm2_vl": test_multimodal.case(
        "lfm2_vl",
        tiny.GROUPED | tiny.CONV | {"model_type": "lfm2", "block_auto_adjust_ff_dim": False},
        VISION | {"model_type": "siglip2_vision_model", "num_patches": 16},
        downsample_factor=1,
        tie_word_embeddings=True,
    ),
    "paligemma": test_multimodal.case(
        "paligemma",
        tiny.TRIPLES | {"model_type": "gemma", "head_dim": 12},
        VISION | {"model_type": "siglip_vision_model"},
        image_token_index=IMAGE,
        projection_dim=48,
    ),
}

WRITTEN = {
    "gemma3": ("gemma3", KINDS),
    "gemma4 small": ("gemma4", KINDS),
    "mistral3": ("llama", KINDS),
    "mistral3 plain": ("mistral3", KINDS),
    "qwen3_5 even": ("qwen35", KINDS),
    "llava": ("llama", KINDS),
    "llava tied inside": ("llama", KINDS),
    "llava qwen2": ("qwen2", ("channels",)),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_vl yarn"), ("qwen2vl", ("channels",))),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl yarn"), ("qwen3vl", KINDS)),
    "qwen3_vl_moe": ("qwen3vlmoe", KINDS),
    "qwen3_5 time": ("qwen35", KINDS),
    "lfm2_vl": ("lfm2", ("channels",)),
}
"""Architecture that computes a case, and kinds of units that are removed, by name of the case."""


@pytest.fixture(autouse=True)
def _cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_multimodal, "CASES", CASES | MORE)


def saved(name: str, folder: Path) -> Path:
    save(name, folder)
    byte_level().save_pretrained(folder)
    return folder


def gap(folder: Path, file: Path, architecture: str) -> float:
    """Relative distance between llama.cpp's logits of a text and the whole multimodal model's."""
    model, ids = opened(folder, trust_remote_code=True), torch.tensor([IDS])
    if architecture == "gemma4":
        with_the_table(model)
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    return relative(run(file, IDS), wanted)


def bound(architecture: str) -> float:
    # As test_gguf has them.
    return 1e-3 if architecture in GELU else 2e-5 if architecture.startswith(("qwen35", "mistral4")) else 2e-6


@pytest.mark.parametrize("name", WRITTEN)
def test_llama_cpp_computes_dense_and_pruned_decoders(tmp_path, name):
    """Pruning into a file writes the same bytes as exporting the pruned folder, without the tower."""
    architecture, kinds = WRITTEN[name]
    dense, notes = saved(name, tmp_path / "dense"), Notes()
    done = export(dense, tmp_path / "dense.gguf", type="f32", watcher=notes)
    assert notes.said == [DECODER_ONLY]
    assert done.architecture == architecture
    assert gap(dense, done.path, architecture) < bound(architecture)
    how = SMALL | {"modules": kinds, "sparsity": 0.3}
    found = prune(dense, tmp_path / "m.gguf", **how, format="gguf", type="f32")
    prune(dense, tmp_path / "out", **how)
    (tmp_path / "again").mkdir()
    again = export(tmp_path / "out", tmp_path / "again" / "m.gguf", type="f32")
    assert again.path.read_bytes() == (tmp_path / "m.gguf").read_bytes()
    assert gap(tmp_path / "out", again.path, architecture) < bound(architecture)
    tensors = {tensor.name: tensor for tensor in GGUFReader(again.path).tensors}
    assert found.bytes == (done.bytes, sum(tensor.n_bytes for tensor in tensors.values()))
    assert {name.split(".")[0].split("_")[0] for name in tensors} <= {"blk", "token", "output", "per", "rope"}
    assert tokens(again.path, TEXT) == open_checkpoint(dense).tokenizer()(TEXT).input_ids


@pytest.mark.parametrize(
    ("name", "architecture"), {"mistral3": "deci", "llava": "deci", "gemma4 small": "gemma4"}.items()
)
def test_a_width_for_each_block(tmp_path, monkeypatch, name, architecture):
    dense, out = saved(name, tmp_path / "dense"), tmp_path / "out"
    assert not prune(dense, out, **SMALL | {"widths": "adaptive"}, sparsity=0.3).uniform
    done = export(out, tmp_path / "m.gguf", type="f32")
    assert done.architecture == architecture
    assert gap(out, done.path, architecture) < bound(architecture)
    monkeypatch.setattr(doctor, "_commands", lambda *of: {})
    (llama_cpp,) = doctor.check_engines(out)
    assert llama_cpp.message.startswith(f"can run its language model as a .gguf file ({architecture}): export it")


def test_the_chat_template_of_a_processor(tmp_path):
    """Older checkpoints have a file for it; a template of the tokenizer is preferred."""
    folder, template = saved("llava", tmp_path / "dense"), tmp_path / "dense" / "chat_template.json"

    def written() -> Any:
        done = export(folder, tmp_path / "m.gguf", overwrite=True)
        field = GGUFReader(done.path).fields.get("tokenizer.chat_template")
        return field and field.contents()

    assert written() is None
    template.write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert written() == "{{ messages }}"
    for damaged in ("{", "[]", '{"chat_template": 5}'):
        template.write_text(damaged)
        assert_error(r"chat_template\.json: not valid JSON with a chat template; download it again", written)
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ own }}"
    tokenizer.save_pretrained(folder)
    assert written() == "{{ own }}"


QWEN = {"v.blk.0.ln1": "blocks.0.norm1", "v.blk.0.ln2": "blocks.0.norm2", "v.blk.0.attn_out": "blocks.0.attn.proj"}
QWEN2 = {"v.blk.0.ffn_up": "blocks.0.mlp.fc1", "v.blk.0.ffn_down": "blocks.0.mlp.fc2"}
QWEN2 |= QWEN | {"v.post_ln": "merger.ln_q", "mm.0": "merger.mlp.0", "mm.2": "merger.mlp.2"}
QWEN3 = {"v.blk.0.ffn_up": "blocks.0.mlp.linear_fc1", "v.blk.0.ffn_down": "blocks.0.mlp.linear_fc2"}
QWEN3 |= QWEN | {"v.blk.0.attn_qkv": "blocks.0.attn.qkv", "v.post_ln": "merger.norm"}
QWEN3 |= {"mm.0": "merger.linear_fc1", "mm.2": "merger.linear_fc2"}
QWEN3 |= {"v.deepstack.0.norm": "deepstack_merger_list.0.norm"}
QWEN3 |= {f"v.deepstack.0.{leaf}": f"deepstack_merger_list.0.linear_{leaf}" for leaf in ("fc1", "fc2")}
"""Qwen's names of layers of towers and mergers, by llama.cpp's names."""


def qwen_towers(folder: Path, file: Path) -> Path:
    """Write the second file, with tower and merger, of a tiny Qwen2-VL or Qwen3-VL of one block and width 48."""
    tower = {
        key.removeprefix("model.").removeprefix("visual."): value
        for key, value in load_file(folder / "model.safetensors").items()
        if "visual." in key
    }
    third = "pos_embed.weight" in tower
    names = QWEN3 if third else QWEN2
    tensors = {f"{ours}.{leaf}": tower[f"{own}.{leaf}"] for ours, own in names.items() for leaf in ("weight", "bias")}
    kernel = tower["patch_embed.proj.weight"]
    tensors |= {"v.patch_embd.weight": kernel[:, :, 0], "v.patch_embd.weight.1": kernel[:, :, 1]}
    if third:
        tensors["v.patch_embd.bias"] = tower["patch_embed.proj.bias"]
        tensors["v.position_embd.weight"] = tower["pos_embed.weight"]
    for leaf in () if third else ("weight", "bias"):
        for letter, rows in zip("qkv", tower[f"blocks.0.attn.qkv.{leaf}"].chunk(3), strict=True):
            tensors[f"v.blk.0.attn_{letter}.{leaf}"] = rows
    sizes = {"image_size": 32, "patch_size": 4, "spatial_merge_size": 2, "feed_forward_length": 24 if third else 32}
    sizes |= {"block_count": 1, "projection_dim": 48, "embedding_length": 16, "attention.head_count": 2}
    writer = GGUFWriter(file, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.use_gelu", third)
    writer.add_string("clip.projector_type", "qwen3vl_merger" if third else "qwen2vl_merger")
    for key, number in sizes.items():
        writer.add_uint32(f"clip.vision.{key}", number)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    for key in ("mean", "std"):
        writer.add_array(f"clip.vision.image_{key}", [0.5] * 3)
    # Whether what comes out of the tower's one block is handed on.
    writer.add_array("clip.vision.is_deepstack_layers", [third])
    for name, values in tensors.items():
        writer.add_tensor(name, values.contiguous().numpy())
    write_out(writer)
    return file


def seen(file: Path, second: Path, picture: Tensor, text: bytes) -> tuple[list[int], Tensor]:
    """llama.cpp's ids of a text with a picture, and its logits after the last token; picture: y x X x rgb, bytes."""
    mtmd = get_mtmd_lib()
    with loaded(file) as model:
        how = mtmd.mtmd_context_params_default()
        how.use_gpu, how.n_threads, how.warmup = False, 1, False
        both = mtmd.mtmd_init_from_file(str(second).encode(), model, how)
        assert both != ffi.NULL, "".join(log[-8:])
        bitmap = mtmd.mtmd_bitmap_init(picture.shape[1], picture.shape[0], picture.numpy().tobytes())
        chunks, given, raw = mtmd.mtmd_input_chunks_init(), ffi.new("mtmd_input_text *"), ffi.new("char[]", text)
        given.text, given.text_len, given.add_special, given.parse_special = raw, len(text), True, True
        assert mtmd.mtmd_tokenize(both, chunks, given, ffi.new("const mtmd_bitmap *[]", [bitmap]), 1) == 0
        ids, count = list[int](), ffi.new("size_t *")
        for index in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, index)
            found = mtmd.mtmd_input_chunk_get_tokens_text(chunk, count)
            length = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
            ids += [IMAGE] * length if found == ffi.NULL else ffi.unpack(found, length)
        settings = lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = 64
        settings.n_threads = settings.n_threads_batch = 1
        settings.type_k = settings.type_v = settings.flash_attn_type = 0
        context = lib.llama_init_from_model(model, settings)
        try:
            assert mtmd.mtmd_helper_eval_chunks(both, context, chunks, 0, 0, 64, True, ffi.new("llama_pos *")) == 0
            return ids, torch.tensor(ffi.unpack(lib.llama_get_logits_ith(context, -1), tiny.VOCAB))
        finally:
            lib.llama_free(context)
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)
            mtmd.mtmd_free(both)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_a_picture_through_the_second_file_of_the_dense_model(tmp_path, name):
    """Positions of a picture come in sections. The tower of Qwen3-VL also gives inputs to the first block."""
    dense, kinds = saved(f"{name} merging", tmp_path / "dense"), WRITTEN[name][1]
    prune(dense, tmp_path / "out", **SMALL | {"modules": kinds}, sparsity=0.3)
    done = export(tmp_path / "out", tmp_path / "m.gguf", type="f32")
    picture = torch.randint(256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    second = qwen_towers(dense, tmp_path / "mmproj.gguf")
    found, logits = seen(done.path, second, picture, b"the sea <__media__> takes the steps")
    assert found.count(IMAGE) == 16
    ids = torch.tensor([found])
    pixels = (picture.permute(2, 0, 1).float() / 255 - 0.5) / 0.5
    # 4 x 4 tokens of 2 x 2 patches of 4 x 4 pixels, seen twice.
    patches = pixels.reshape(3, 4, 2, 4, 4, 2, 4).permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)
    rows = patches.expand(-1, -1, -1, -1, -1, 2, -1, -1).reshape(64, -1)
    more = {"image_grid_thw": torch.tensor([[1, 8, 8]]), "mm_token_type_ids": (ids == IMAGE).long()}
    small = opened(tmp_path / "out")
    with torch.no_grad():
        wanted, blank = (small(ids, pixel_values=values, **more).logits[0, -1] for values in (rows, 0 * rows))
        small.model.visual.deepstack_visual_indexes = []
        flat = small(ids, pixel_values=rows, **more).logits[0, -1]
        plain = small(ids, pixel_values=rows, **more, position_ids=torch.arange(len(found)).expand(3, 1, -1))
    others = [blank, plain.logits[0, -1], *([flat] if name.startswith("qwen3") else [])]
    assert relative(logits, wanted) < 1e-3
    assert all(relative(other, wanted) > 0.1 for other in others)


REFUSED = {
    "paligemma": "llama.cpp's gemma attends to earlier tokens only, unlike the model; keep the safetensors folder",
    "llama4": "llama4 needs experts in all blocks or in none",
    "qwen3_5": "qwen35 rotates entries of a head in pairs, but 3 rotate here",
}


@pytest.mark.parametrize("name", REFUSED)
def test_decoders_that_llama_cpp_lacks_are_refused(tmp_path, name):
    checkpoint = open_checkpoint(saved(name, tmp_path / "dense"))
    assert REFUSED[name] in (gguf_unsupported(checkpoint, widths_of(checkpoint.config)) or "")
    assert_error("dense: ", export, tmp_path / "dense", tmp_path / "m.gguf")
    assert_error("", prune, tmp_path / "dense", tmp_path / "m.gguf", **SMALL, sparsity=0.3, format="gguf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["dense"]


def exports_the_same(folder: Path, change: Callable[[], Any]) -> bool:
    """Return whether a changed folder gives the same file."""
    out = folder.with_suffix(".gguf")
    before = export(folder, out).path.read_bytes()
    change()
    return export(folder, out, overwrite=True).path.read_bytes() == before


def test_checkpoints_in_other_forms(tmp_path):
    """Newer ones have other names of tensors. In Qwen's published form, the config has the language model's keys among
    all others, and experts' matrices have inputs first."""
    folder = saved("llava", tmp_path / "llava")
    assert exports_the_same(folder, lambda: test_multimodal.rename_as_newer_checkpoints(folder))
    qwen = saved("qwen2_vl", tmp_path / "qwen")
    theta = TURNED["rope_theta"]
    assert exports_the_same(qwen, lambda: test_multimodal.write_config_of_older_checkpoints(qwen, theta))
    mixture = saved("qwen3_vl_moe", tmp_path / "mixture")
    file, form = mixture / "model.safetensors", {"format": "pt"}
    assert exports_the_same(mixture, lambda: save_file(turned(mixture), file, metadata=form))
