"""Importances, with which llama.cpp's library rounds weights: mean squares of the inputs of layers."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.pytorch_utils import Conv1D

import models as tiny
from outputs import Notes, assert_error, edited_weights
from secateur import prune
from secateur.base.progress import Silent
from secateur.formats.folder import open_folder
from secateur.gguf import export as exporting
from secateur.gguf.export import export
from secateur.gguf.importance import measured, read_importance
from secateur.gguf.llama_cpp import LLAMA_TYPES, NEEDING_IMPORTANCE, quantise
from secateur.text.calibration import calibration_rows

NAMES = {
    "llama": {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    "gpt2": {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
    "phi3": {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"},
}
"""llama.cpp's names of the layers of a block, by transformers' names."""


def layers_with_inputs(model: Any, ids: Tensor, kinds: tuple[type, ...]) -> dict[str, list[Any]]:
    """Return the arguments of the first block's modules of some kinds in a forward pass, by path."""
    seen = dict[str, list[Any]]()
    block = tiny.layers_of(model)[0]
    for path, module in block.named_modules():
        if isinstance(module, kinds):
            module.register_forward_pre_hook(lambda _, args, path=path: seen.update({path: list(args)}))
    tiny.logits_of(model, ids)
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_importances_are_mean_squares_of_inputs(name, tmp_path):
    folder, ids = tiny.save(name, tmp_path / "model"), tiny.token_rows(6, 12)
    found = measured(open_folder(folder), Silent(), rows=ids, device="cpu")
    inputs = layers_with_inputs(AutoModelForCausalLM.from_pretrained(folder), ids, (nn.Linear, Conv1D))
    for path, layer in NAMES[name].items():
        wanted = inputs[path][0].flatten(0, -2).square().mean(dim=0)
        assert tiny.relative(found[f"blk.0.{layer}.weight"], wanted) < 1e-4, path
    assert not {"token_embd.weight", "output.weight"} & found.keys()


def test_each_expert_has_the_importances_of_its_own_tokens(tmp_path):
    folder, ids = tiny.save("mixtral", tmp_path / "model"), tiny.token_rows(6, 12)
    found = measured(open_folder(folder), Silent(), rows=ids, device="cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    experts = tiny.layers_of(model)[0].mlp.experts
    x_nd, places_nk, _ = layers_with_inputs(model, ids, (type(experts),))["mlp.experts"]
    count = len(experts.down_proj)
    for number in range(count):
        own = x_nd[(places_nk == number).any(dim=1)]
        gate, up = (own @ experts.gate_up_proj[number].T).chunk(2, dim=-1)
        wanted = {"ffn_gate_exps": own, "ffn_up_exps": own, "ffn_down_exps": experts.act_fn(gate) * up}
        for layer, inputs in wanted.items():
            importance = found[f"blk.0.{layer}.weight"].view(count, -1)[number]
            assert tiny.relative(importance, inputs.detach().square().mean(dim=0)) < 1e-4, layer


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "gemma4_text small", "bloom"])
def test_each_matrix_has_an_importance_for_each_column(name, tmp_path, letters_folder):
    folder = letters_folder(name)
    found = measured(open_folder(folder), Silent(), rows=tiny.token_rows(2, 8), device="cpu")
    exact = export(folder, tmp_path / "exact.gguf", type="f32").path
    for tensor in GGUFReader(exact).tensors:
        if tensor.name.startswith("blk.") and ("attn" in tensor.name or "ffn" in tensor.name):
            columns, experts = int(tensor.shape[0]), int(tensor.shape[2]) if len(tensor.shape) > 2 else 1
            if len(tensor.shape) > 1 and "ffn_gate_inp" not in tensor.name and "norm" not in tensor.name:
                assert len(found[tensor.name]) == columns * experts, tensor.name
                assert found[tensor.name].isfinite().all()
                assert (found[tensor.name].view(experts, -1).sum(dim=-1) > 0).all()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model whose rows fill blocks of 256, with inputs of very different size."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=tiny.VOCAB, **sizes)).save_pretrained(folder)
    tiny.make_letters().save_pretrained(folder)
    with edited_weights(folder) as tensors:
        for name in [name for name in tensors if name.endswith("layernorm.weight")]:
            tensors[name] = torch.randn(256).exp()
    return folder


def write_imatrix(file: Path, matrix: dict[str, tuple[Any, Any]]) -> Path:
    """Write sums of squares and counts of tokens by tensor, as llama-imatrix does."""
    writer = GGUFWriter(file, "llama")
    for name, (sums, counts) in matrix.items():
        writer.add_tensor(f"{name}.in_sum2", sums.astype(np.float32))
        writer.add_tensor(f"{name}.counts", counts.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def error(file: Path, folder: Path, importance: Tensor) -> float:
    """Return the error of a layer's weights, weighted by the importances of its columns."""
    tensor = next(one for one in GGUFReader(file).tensors if one.name == "blk.0.ffn_up.weight")
    values = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
    dense = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    return float(((values - dense).square() * importance).sum())


def test_a_text_makes_the_error_of_important_columns_smaller(wide, tmp_path):
    plain = export(wide, tmp_path / "plain.gguf", type="q2_k")
    weighted = export(wide, tmp_path / "weighted.gguf", type="q2_k", calibration="random", device="cpu")
    importance = measured(open_folder(wide), Silent(), rows=tiny.token_rows(16, 32), device="cpu")[
        "blk.0.ffn_up.weight"
    ]
    assert plain.bytes == weighted.bytes
    assert error(weighted.path, wide, importance) < 0.8 * error(plain.path, wide, importance)


def test_an_importance_matrix_of_llama_cpp_gives_the_same_file(wide, tmp_path, monkeypatch):
    used = list[Any]()
    monkeypatch.setattr(exporting, "quantise", lambda *given: (used.append(given[-1]), quantise(*given)))
    ours = export(wide, tmp_path / "model.gguf", type="iq2_xxs", calibration="random", device="cpu").path
    matrix = {name: (values[None].numpy() * 512, np.full((1, 1), 512)) for name, values in used[0].items()}
    written = write_imatrix(tmp_path / "imatrix.gguf", matrix)
    (tmp_path / "other").mkdir()
    given = export(wide, tmp_path / "other" / "model.gguf", type="iq2_xxs", imatrix=written).path
    assert ours.read_bytes() == given.read_bytes()


def test_an_expert_without_tokens_has_equal_importances(tmp_path):
    matrix = {"blk.0.ffn_up_exps.weight": (np.array([[2.0, 4.0], [0.0, 0.0]]), np.array([[2.0], [0.0]]))}
    (found,) = read_importance(write_imatrix(tmp_path / "imatrix.gguf", matrix)).values()
    assert found.tolist() == [1.0, 2.0, 1.0, 1.0]


def test_every_type_of_the_library_is_written(wide, tmp_path):
    exact = export(wide, tmp_path / "exact.gguf", type="f32").path
    importance = measured(open_folder(wide), Silent(), rows=tiny.token_rows(2, 8), device="cpu")
    for type, most in LLAMA_TYPES.items():
        quantise(exact, tmp_path / "out.gguf", type, importance)
        kinds = [one.tensor_type for one in GGUFReader(tmp_path / "out.gguf").tensors]
        assert most in kinds, type
        if type in NEEDING_IMPORTANCE:
            assert_error(f"cannot convert the model to {type}", quantise, exact, tmp_path / "out.gguf", type)


def test_a_note_tells_which_matrices_have_another_type(wide, tmp_path, letters_folder):
    notes = Notes()
    export(letters_folder("llama"), tmp_path / "small.gguf", type="q4_k_m", watcher=notes)
    export(wide, tmp_path / "wide.gguf", type="q4_k_m", watcher=notes)
    (note,) = notes.said
    assert "23 of 30 tensors are f16" in note
    assert "no multiple of 256" in note
    assert "bits per weight" in note


def test_sources_of_importances_are_checked(wide, tmp_path):
    def refused(said: str, **options: Any) -> None:
        assert_error(said, export, wide, tmp_path / "out.gguf", **options)
        assert list(tmp_path.glob("*out*")) == []

    refused("leave one of them out", type="q4_k_m", calibration="general", imatrix="x.gguf")
    refused("calibration is only for types that llama.cpp's library makes", type="q8_0", calibration="general")
    refused("imatrix is only for", type="q8_0", imatrix="x.gguf")
    refused("type iq2_xxs needs importances", type="iq2_xxs")
    refused("no such file", type="q4_k_m", imatrix=tmp_path / "none.gguf")
    (tmp_path / "old.dat").write_bytes(b"\x01\0\0\0old")
    refused("write it again as .gguf", type="q4_k_m", imatrix=tmp_path / "old.dat")
    model = export(wide, tmp_path / "model.gguf").path
    refused("not an importance matrix", type="q4_k_m", imatrix=model)
    (tmp_path / "short.txt").write_text("w1")
    refused("short.txt", type="q4_k_m", calibration=str(tmp_path / "short.txt"))


def test_the_command_line_takes_a_text(place, run, letters_folder):
    done = run(
        "export",
        str(letters_folder("llama")),
        "out.gguf",
        "--type",
        "q4_k_m",
        "--calibration",
        "text.txt",
        "--device",
        "cpu",
    )
    assert done.code == 0, done.err
    assert (place / "out.gguf").is_file()


def test_prune_writes_types_of_the_library(wide, tmp_path, monkeypatch):
    """The importances are those of the rows in the pruned model, and channels fill the type's blocks of 256."""
    used = list[Any]()
    monkeypatch.setattr(exporting, "quantise", lambda *given: (used.append(given[-1]), quantise(*given)))
    how: dict[str, Any] = {"calibration": "random", "samples": 32, "length": 8, "recovery": "none", "device": "cpu"}
    how |= {"modules": ("channels",), "sparsity": 0.3}
    prune(wide, tmp_path / "out.gguf", format="gguf", type="iq2_xxs", **how)
    prune(wide, tmp_path / "out", round=256, **how)
    channels = [int(one.shape[0]) for one in GGUFReader(tmp_path / "out.gguf").tensors if "ffn_down" in one.name]
    assert min(channels) < 1024
    assert not any(number % 256 for number in channels)
    tokenizer = open_folder(wide).tokenizer()
    rows = calibration_rows(tokenizer, "random", samples=32, length=8, seed=0, vocab_size=tiny.VOCAB)
    wanted = measured(open_folder(tmp_path / "out"), Silent(), rows=rows, device="cpu")
    assert used[0].keys() == wanted.keys()
    assert all(torch.equal(used[0][name], values) for name, values in wanted.items())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "out.gguf"]


def test_bytes_of_types_of_the_library_are_no_target(wide, tmp_path):
    how: dict[str, Any] = {"calibration": "random", "samples": 4, "length": 8, "format": "gguf", "type": "q4_k_m"}
    assert_error("bytes of type q4_k_m are known only", prune, wide, tmp_path / "o.gguf", target="bytes=1MB", **how)
