"""A checkpoint is opened lazily, and one that cannot be pruned is refused in one line."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import models
from outputs import edit_json, edited_weights, error_of
from secateur import prune
from secateur.base.quiet import quiet
from secateur.checkpoints import hub_source
from secateur.checkpoints.checkpoint import Checkpoint, open_checkpoint
from secateur.checkpoints.config_file import READ, empty_model, prepared_config
from secateur.checkpoints.weights import TensorInfo
from secateur.families.registry import FAMILIES
from secateur.gguf import source as gguf_source
from secateur.gguf.export import export
from secateur.measure.loading import load
from tiny_tokenizers import gpt2

TINY = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
TINY |= {"num_attention_heads": 4, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
WEIGHTS = "model.safetensors"
GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
OPT = {**TINY, "ffn_dim": 24, "word_embed_proj_dim": 16}


def save(folder: Path, model_type: str = "llama", *, shard: str = "1GB", **keys) -> dict[str, torch.Tensor]:
    """Save a tiny random model; return its parameters by transformers' names."""
    base = {"gpt2": GPT2, "opt": OPT}.get(model_type, TINY)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**base, **keys}))
    model.to(torch.bfloat16)
    with quiet():
        model.save_pretrained(folder, max_shard_size=shard)
    return {name: value.detach() for name, value in model.named_parameters()}


def meta_model(checkpoint: Checkpoint) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(checkpoint.config)


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("shard", ["1GB", "5KB"])
def test_reading_returns_the_saved_tensors(tmp_path, shard):
    parameters = save(tmp_path, shard=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard != "1GB")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.source == str(tmp_path)
    assert checkpoint.path == tmp_path
    assert checkpoint.config.model_type == checkpoint.raw_config["model_type"] == "llama"
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.bytes == sum(2 * value.numel() for value in parameters.values())
    assert [file.name for file in checkpoint.files] == ["generation_config.json"]
    checkpoint.check_shapes(meta_model(checkpoint))
    assert checkpoint.left_out == ()
    for name, value in parameters.items():
        assert checkpoint.resolve(name) == name
        assert checkpoint.tensors[name].shape == tuple(value.shape)
        assert torch.equal(checkpoint.read(name), value)
    assert checkpoint.resolve("nothing") is None
    assert checkpoint.resolve("layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"


def test_opening_reads_headers_only(folder, monkeypatch):
    monkeypatch.setattr(TensorInfo, "read", lambda _: pytest.fail("a tensor was read"))
    checkpoint = open_checkpoint(folder)
    monkeypatch.undo()
    tensor = checkpoint.read("model.embed_tokens.weight")
    # The tensor owns its memory: it is neither a map of the file nor a view of a larger block.
    assert tensor.untyped_storage().nbytes() == tensor.nbytes
    before = tensor.clone()
    file = folder / WEIGHTS
    file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(tensor, before)


def test_a_file_that_became_shorter_is_an_error(folder):
    checkpoint = open_checkpoint(folder)
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1])
    last = max(checkpoint.tensors, key=lambda name: checkpoint.tensors[name].offset)
    assert "changed since it was opened" in error_of(checkpoint.read, last)


@pytest.mark.parametrize(
    ("model_type", "prefix", "name"),
    [
        ("gpt2", "transformer.", "transformer.h.0.ln_1.weight"),
        ("opt", "model.", "model.decoder.layers.1.fc1.bias"),
        ("gpt_neox", "", "gpt_neox.layers.0.mlp.dense_h_to_4h.bias"),
    ],
)
def test_names_without_the_base_prefix_and_of_older_versions(tmp_path, model_type, prefix, name):
    parameters = save(tmp_path, model_type)
    stored = load_file(tmp_path / WEIGHTS)
    bare = {key.removeprefix(prefix): value for key, value in stored.items()}
    bare |= {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(-1e4)} if prefix else {}
    save_file(bare, tmp_path / WEIGHTS)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.resolve(name) == name.removeprefix(prefix)
    assert torch.equal(checkpoint.read(checkpoint.resolve(name)), parameters[name])
    assert checkpoint.tensors.keys() - checkpoint.weights == bare.keys() - {key.removeprefix(prefix) for key in stored}
    assert checkpoint.bytes == sum(value.nbytes for value in stored.values())
    assert checkpoint.dtype == torch.bfloat16
    checkpoint.check_shapes(meta_model(checkpoint))
    assert checkpoint.left_out == ()
    assert checkpoint.resolve("lm_head.weight") == ("embed_out.weight" if model_type == "gpt_neox" else None)


def test_tied_weights_may_be_missing_and_unknown_tensors_are_ignored(tmp_path):
    save(tmp_path, tie_word_embeddings=True)
    stored = load_file(tmp_path / WEIGHTS)
    assert "lm_head.weight" not in stored
    save_file({**stored, "extra.head": torch.ones(2)}, tmp_path / WEIGHTS)
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.check_shapes(meta_model(checkpoint))
    assert checkpoint.left_out == ("extra.head",)
    assert checkpoint.tensors.keys() == stored.keys()


def renamed(before: str, after: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / before).rename(folder / after)


def weights_are(data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / WEIGHTS).write_bytes(data)


def cut_at(size: int) -> Callable[[Path], Any]:
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])


def header(**entries: tuple[str, list[Any], list[int]]) -> Callable[[Path], Any]:
    """Weights of eight bytes with a header: dtype, shape and offsets of each tensor."""
    names = ("dtype", "shape", "data_offsets")
    text = json.dumps({key: dict(zip(names, entry, strict=True)) for key, entry in entries.items()}).encode()
    return weights_are(len(text).to_bytes(8, "little") + text + bytes(8))


def index(contents: Any) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "a.safetensors")
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(contents))

    return apply


def config(**values: Any) -> Callable[[Path], Any]:
    return lambda folder: edit_json(folder / "config.json", **values)


def config_is(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "config.json").write_text(text)


def eight_bit(folder: Path) -> None:
    with edited_weights(folder) as stored:
        stored |= {name: value.to(torch.float8_e4m3fn) for name, value in stored.items()}


def shards(**places: str) -> dict[str, Any]:
    return {"weight_map": {name: f"{place}.safetensors" for name, place in places.items()}}


CODE = {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "only pickled weights": (renamed(WEIGHTS, "pytorch_model.bin"), "only pickled weights .* use a revision with safe"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no weights; model.safetensors or"),
    "other safetensors": (renamed(WEIGHTS, "x.safetensors"), "neither model.safetensors nor"),
    "missing shards": (index(shards(a="a", b="b", c="c")), "shards missing: b.safetensors, c.safetensors; download"),
    "a shard elsewhere": (index(shards(a="../a")), "'../a.safetensors' is missing from the folder"),
    "shard lacks a tensor": (index(shards(b="a")), "a.safetensors: tensors missing that .* names: b;"),
    "index without map": (index([]), "not a safetensors index"),
    "header overlaps": (header(x=("F32", [2], [0, 8]), y=("F32", [1], [4, 8])), r"header broken \(y\)"),
    "header of fractions": (header(x=("F32", [2.0], [0, 8])), "header broken .*whole number"),
    "unknown dtype": (header(x=("F3", [2], [0, 8])), "header broken"),
    "wrong offsets": (header(x=("F32", [3], [0, 8])), "header broken"),
    "integers": (header(x=("I32", [2], [0, 8])), "no floating-point weights; use an unquantised"),
    "empty file": (cut_at(0), "truncated, or not a safetensors"),
    "header cut": (cut_at(100), "truncated, or not a safetensors"),
    "data cut": (cut_at(-10), r"truncated or damaged: it has [\d,]+ bytes, but its header says"),
    "header not JSON": (weights_are((4).to_bytes(8, "little") + b"nope"), "header broken"),
    "pointer": (weights_are(b"version 1, a pointer, oid sha256:0"), "Git LFS pointer.*git lfs pull"),
    "8-bit": (eight_bit, "8-bit weights"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json; name a folder"),
    "adapter": (renamed("config.json", "adapter_config.json"), "an adapter without its base model; merge"),
    "adapter beside": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "adapter_config.json: transformers would add this adapter to the model; merge it",
    ),
    "gguf inside": (renamed("config.json", "m.gguf"), "no config.json, but m.gguf; name that file"),
    "broken config": (config_is('{"a": 1,\n "b": }'), r"config.json: not valid JSON at line 2 column 7 \(Expecting"),
    "config no object": (config_is("[]"), "no model_type"),
    "no model_type": (config_is("{}"), "no model_type"),
    "encoder-decoder": (config_is('{"model_type": "t5"}'), "t5 is an encoder-decoder model"),
    "no language model": (config_is('{"model_type": "vit"}'), "vit has no causal language model class"),
    "unknown model_type": (config(model_type="llamma"), "does not know model_type 'llamma'; upgrade"),
    "config refused": (config(num_attention_heads=5), "transformers rejects it .*not a multiple of the number"),
    "own code": (config(model_type="mine", auto_map=CODE), r"the checkpoint \(auto_map\).*trust_remote_code"),
    "gptq": (config(quantization_config={"quant_method": "gptq"}), r"quantised weights \(gptq\).*use an unquantised"),
    "bitsandbytes": (config(quantization_config={"load_in_8bit": True}), r"quantised weights \(unknown\)"),
    "compressed": (
        config(compression_config={"quant_method": "compressed-tensors"}),
        r"quantised weights \(compressed-tensors\)",
    ),
    "vision": (config(vision_config={"hidden_size": 8}), r"llama is a multimodal model \(vision_config\)"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused_in_one_line(folder, case):
    breaking, expected = BROKEN[case]
    breaking(folder)
    message = error_of(open_checkpoint, folder)
    assert re.search(expected, message)
    assert str(folder) in message


def test_code_of_the_checkpoint_is_not_run_where_transformers_knows_the_model(folder):
    edit_json(folder / "config.json", auto_map=CODE)
    for trust in (False, True):
        checkpoint = open_checkpoint(folder, trust_remote_code=trust)
        assert type(checkpoint.config).__name__ == "LlamaConfig"
        assert not checkpoint.trust_remote_code


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Replace the hub by one repository: its files, its errors, and a record of what is requested."""
    state = SimpleNamespace(files=[], error=None, reach=None, cached=None, wanted=None, folder=tmp_path / "m")

    def snapshot(repo, *, revision, allow_patterns, local_files_only=False):
        if local_files_only:
            if state.cached is None:
                raise FileNotFoundError(repo)
            return str(state.cached)
        state.wanted = allow_patterns
        return str(state.folder)

    def listing(repo, *, revision):
        if state.error is not None:
            raise state.error
        return state.files

    monkeypatch.setattr(hub_source, "snapshot_download", snapshot)
    monkeypatch.setattr(hub_source, "list_repo_files", listing)
    monkeypatch.setattr(hub_source, "hf_hub_download", lambda _, name, *, revision: str(state.folder / name))
    monkeypatch.setattr(hub_source, "out_of_reach", lambda: state.reach)
    return state


def test_hub_downloads_one_set_of_safetensors(hub):
    save(hub.folder)
    hub.files = ["config.json", WEIGHTS, "consolidated.safetensors", "tokenizer.json", "merges.txt"]
    hub.files += ["pytorch_model.bin", "onnx/model.onnx", "onnx/config.json", "README.md", "x.gguf"]
    assert open_checkpoint("owner/name").path == hub.folder
    assert sorted(hub.wanted) == ["config.json", "merges.txt", WEIGHTS, "tokenizer.json"]


def test_hub_downloads_shards_of_any_name_and_the_files_that_accompany_weights(hub):
    """Repositories of Qwen3.5 name their shards in another way than transformers."""
    save(hub.folder)
    shards = ["model.safetensors-00001-of-00002.safetensors", "model.safetensors-00002-of-00002.safetensors"]
    beside = ["LICENSE", "NOTICE", "USE_POLICY.md", "tokenizer.model.v3", "additional_chat_templates/tool.jinja"]
    hub.files = ["config.json", "model.safetensors.index.json", *shards, *beside, "README.md", "other.safetensors"]
    weight_map = {"a": shards[0], "b": shards[1], "c": shards[1]}
    (hub.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    hub_source.hub_folder("owner/name", None)
    assert sorted(hub.wanted) == sorted(["config.json", "model.safetensors.index.json", *shards, *beside])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_model.bin", "only pickled weights"),
        ("m.Q4_0.gguf", "only GGUF files, such as m.Q4_0.gguf; download one"),
        ("flax_model.msgpack", "no safetensors weights on the hub"),
    ],
)
def test_a_repository_without_safetensors_is_refused_before_downloading(hub, file, message):
    hub.files = ["config.json", file]
    assert message in error_of(open_checkpoint, "owner/name")
    assert hub.wanted is None


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (GatedRepoError, "gated; accept its terms"),
        (RepositoryNotFoundError, "no such folder and no such model on the hub"),
        (RevisionNotFoundError, "the hub has no revision 'v9'"),
        (HfHubHTTPError, "download failed (first line); try again"),
        (None, "download failed (dropped)"),
    ],
)
def test_errors_of_the_hub_become_one_line(hub, kind, message):
    response = SimpleNamespace(headers={}, request=None)
    hub.error = kind("first line\nsecond line", response=response) if kind else RuntimeError("dropped")
    assert message in error_of(open_checkpoint, "owner/name", revision="v9")


def test_the_cache_is_used_when_the_hub_is_out_of_reach(hub, tmp_path):
    hub.reach = "HF_HUB_OFFLINE is set"
    assert "not in the cache, and HF_HUB_OFFLINE is set; name a local folder" in error_of(open_checkpoint, "owner/name")
    # A cached model is used; without a tokenizer in the cache the hub is asked for it, if it can be.
    hub.cached = tmp_path / "cached"
    save(hub.cached)
    assert open_checkpoint("owner/name").path == hub.cached
    (hub.cached / "tokenizer.json").write_text("{}")
    hub.reach, hub.error = None, AssertionError("not to be asked")
    assert open_checkpoint("owner/name").path == hub.cached
    (hub.cached / WEIGHTS).unlink()
    hub.reach = "it does not answer"
    assert "not in the cache" in error_of(open_checkpoint, "owner/name")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "secateur"


@pytest.fixture
def gguf_file(tmp_path, letters_folder):
    return export(letters_folder("llama"), tmp_path / "tiny.gguf", type="f32").path


def test_a_gguf_file_is_read_alone_and_not_replaced(gguf_file, cache):
    wanted = open_checkpoint(gguf_file).tokenizer()("abcabc")["input_ids"]
    shutil.rmtree(cache)
    gpt2().save(str(gguf_file.parent / "tokenizer.json"))
    assert open_checkpoint(gguf_file).tokenizer()("abcabc")["input_ids"] == wanted
    how = {"format": "gguf", "widths": "uniform", "calibration": "random", "overwrite": True}
    assert "this is the file of MODEL, which would be replaced; choose" in error_of(prune, gguf_file, gguf_file, **how)


def test_a_gguf_file_is_dequantised_once(gguf_file, cache, letters_folder, monkeypatch, capfd):
    capfd.readouterr()
    checkpoint = open_checkpoint(gguf_file)
    assert capfd.readouterr() == ("", "")
    assert checkpoint.source == str(gguf_file)
    assert checkpoint.dtype == torch.bfloat16
    assert "quantization_config" not in checkpoint.raw_config
    checkpoint.check_shapes(meta_model(checkpoint))
    assert checkpoint.left_out == ()
    name, dense = "model.layers.0.mlp.up_proj.weight", open_checkpoint(letters_folder("llama"))
    assert torch.equal(checkpoint.read(name), dense.read(name).bfloat16())
    ends = {json.loads((checkpoint.path / "generation_config.json").read_text())["eos_token_id"]}
    assert ends == {checkpoint.config.eos_token_id} == {dense.tokenizer().eos_token_id}
    assert list(cache.iterdir()) == [checkpoint.path]
    monkeypatch.setattr(gguf_source, "_convert", lambda *args: pytest.fail("converted again"))
    assert open_checkpoint(gguf_file).path == checkpoint.path
    with pytest.raises(pytest.fail.Exception):
        open_checkpoint(gguf_file, dtype=torch.float32)


def test_gguf_conversion_that_fails_leaves_nothing(gguf_file, cache, monkeypatch):
    def convert(file, folder, dtype):
        (folder / WEIGHTS).write_bytes(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_source, "_convert", convert)
    message = error_of(open_checkpoint, gguf_file)
    assert "the disk is full; free some space, or set XDG_CACHE_HOME to another folder" in message
    assert list(cache.iterdir()) == []


def test_broken_gguf_files_are_refused(gguf_file, cache):
    data = gguf_file.read_bytes()
    gguf_file.write_bytes(b"PK" + data)
    assert "not a GGUF file (it starts with b'PKGG')" in error_of(open_checkpoint, gguf_file)
    for size in (4, 10, 50, 500, len(data) // 2, len(data) - 10):
        gguf_file.write_bytes(data[:size])
        assert "truncated or broken GGUF; download it again" in error_of(open_checkpoint, gguf_file)
    part = gguf.GGUFWriter(gguf_file, "llama")
    part.add_uint16("split.count", 3)
    part.write_header_to_file()
    part.write_kv_data_to_file()
    part.close()
    assert "one of 3 parts; merge them" in error_of(open_checkpoint, gguf_file)
    assert not cache.exists() or list(cache.iterdir()) == []


@pytest.mark.parametrize("kind", ["named", "blocks"])
def test_multi_token_prediction_heads_are_left_out(folder, kind):
    """Multi-token prediction heads are not read, under names of their own or as extra blocks (DeepSeek)."""
    plain = open_checkpoint(folder)
    tensors = load_file(folder / WEIGHTS)
    place = {"named": "mtp.layers.0", "blocks": "model.layers.2"}[kind]
    more = {name.replace("model.layers.0", place): value.clone() for name, value in tensors.items() if ".0." in name}
    assert more
    save_file(tensors | more | {f"{place}.eh_proj.weight": torch.ones(2)}, folder / WEIGHTS)
    edit_json(folder / "config.json", num_nextn_predict_layers=1)
    found = open_checkpoint(folder)
    assert found.tensors.keys() == plain.tensors.keys()
    assert set(found.left_out) == {*more, f"{place}.eh_proj.weight"}
    assert found.raw_config == plain.raw_config | {"num_nextn_predict_layers": 0}


def test_a_model_with_experts_larger_than_any_memory_is_described():
    config = AutoConfig.for_model("mixtral", **TINY, num_local_experts=2**36)
    assert all(value.is_meta for value in empty_model(AutoModelForCausalLM, config).parameters())


def test_a_model_with_its_own_code_is_loaded_with_consent(folder):
    names = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    edit_json(folder / "config.json", model_type="mine", auto_map=names)
    (folder / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    assert "read that code, then pass trust_remote_code" in error_of(prune, folder, folder.with_name("out"))
    with quiet():
        network = load(open_checkpoint(folder, trust_remote_code=True), torch.float32, torch.device("cpu"))
    assert type(network).__name__ == "MineForCausalLM"


def test_keys_that_a_class_does_not_read_are_not_seen():
    """Whatever the keys that other families read, the config object is the same."""
    configs = map(models.config_of, reversed([*models.ROWS, *models.SIMILAR, *models.MIXTURES]))
    raw = {config.model_type: config.to_dict() for config in configs}
    assert raw.keys() == FAMILIES.keys()
    every = {key: value for one in raw.values() for key, value in one.items() if value}
    every |= {"alpha": 2.0, "llama_4_scaling_beta": 0.1}
    # Some classes that do not declare the rotary keys read them; transformers refuses the last key beside a window.
    rotary = {"rope_parameters", "partial_rotary_factor", "rotary_dim"}
    always = READ | rotary | {"model_type", "attention_chunk_size"}
    for kind, own in raw.items():
        cls = CONFIG_MAPPING[kind]
        strays = {key: every[key] for key in every.keys() - always - {*dir(cls())} - cls.attribute_map.keys()}
        plain, found = (vars(prepared_config(values)) for values in (own, own | strays))
        ignored = {"_sliding_window_pattern", "ignore_keys_at_rope_validation"}
        assert {key for key in found if found[key] != plain.get(key)} <= ignored, kind
    rope = {"rope_type": "default", "rope_theta": 1e4}
    more = {"alpha": 2.0, "llama_4_scaling_beta": 0.1, "partial_rotary_factor": 0.5}
    read = {kind: prepared_config(raw[kind] | {"rope_parameters": rope | more}) for kind in ("llama", "phi3")}
    assert read["llama"].rope_parameters == rope
    assert read["phi3"].rope_parameters == rope | {"partial_rotary_factor": 0.5}
