"""Multimodal checkpoints: the language model inside is pruned, and all else handed on as it is."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

import models as tiny
from models import make_letters, relative, silenced, token_rows
from outputs import assert_error, edited_weights
from secateur import BlockStream, open_checkpoint, prune, prune_model
from secateur.base.quiet import quiet
from secateur.formats.format import format_class
from secateur.measure.loading import load
from secateur.model.kinds import KINDS
from secateur.model.structure import KeptUnits
from secateur.model.units.experts import EXPERT_CHANNELS
from secateur.retraining.retrain import retrain
from secateur.vocabulary.cut import cut_as_before
from secateur.vocabulary.side_files import ids_in_configs

IMAGE = tiny.VOCAB - 1
"""The token in whose place a part of the image stands."""
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4}
TURNED = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
QWEN_VISION = {"depth": 1, "patch_size": 4, "spatial_merge_size": 1, "temporal_patch_size": 1}
QWEN3_VISION = QWEN_VISION | {"hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 48}
QWEN3_VISION |= {"num_position_embeddings": 16}
DEEPSTACK = QWEN3_VISION | {"deepstack_visual_indexes": [0]}
QWEN_TOWERS: dict[str, dict[str, Any]] = {
    "qwen2_vl": QWEN_VISION | {"embed_dim": 16, "hidden_size": 48, "num_heads": 2, "mlp_ratio": 2},
    "qwen2_5_vl": QWEN_VISION
    | {"hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 48}
    | {"window_size": 8, "fullatt_block_indexes": [0]},
    "qwen3_vl": DEEPSTACK,
    "qwen3_vl_moe": DEEPSTACK,
}
QWEN_SIZES = {"qwen3_vl": {"head_dim": 8}}
QWEN_SIZES["qwen3_vl_moe"] = {"head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def case(kind: str, text: dict[str, Any], tower: dict[str, Any], **keys: Any) -> tuple[str, dict[str, Any]]:
    """Return the model type and the config of a multimodal model, from the keys of its language model and its tower."""
    return kind, {"text_config": tiny.SIZES | text, "vision_config": tower, "image_token_id": IMAGE} | keys


def gemma4(text: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    tower = VISION | {"model_type": "gemma4_vision", "head_dim": 8, "num_key_value_heads": 2}
    tower |= {"pooling_kernel_size": 2, "position_embedding_size": 16}
    return case("gemma4", text | {"model_type": "gemma4_text"}, tower)


def mistral3(text: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    tower = VISION | {"model_type": "pixtral", "head_dim": 8}
    return case("mistral3", text, tower, spatial_merge_size=1, tie_word_embeddings=False)


ENDS = {"boi_token_index": tiny.VOCAB - 2, "eoi_token_index": tiny.VOCAB - 3}
# Four patches are shuffled into one.
LLAMA4_VISION = VISION | {"model_type": "llama4_vision_model", "image_size": 16, "intermediate_size": 64}
LLAMA4_VISION |= {"vision_output_dim": 24, "projector_input_dim": 24, "projector_output_dim": 24}
LLAVA = tiny.TRIPLES | {"model_type": "llama"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": case(
        "gemma3",
        tiny.GEMMA | {"model_type": "gemma3_text"},
        VISION | {"model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        **ENDS,
    ),
    "mistral3": mistral3(tiny.GROUPED | {"model_type": "mistral", "head_dim": 10, "sliding_window": None}),
    "mistral4": mistral3(tiny.MISTRAL4 | {"model_type": "mistral4"}),
    "llava": case(
        "llava",
        LLAVA,
        VISION | {"model_type": "clip_vision_model", "projection_dim": 16},
        image_seq_length=4,
        tie_word_embeddings=False,
    ),
    "smolvlm": case(
        "smolvlm", LLAVA, VISION | {"model_type": "smolvlm_vision"}, scale_factor=1, tie_word_embeddings=True
    ),
    "qwen3_5": case("qwen3_5", tiny.TRIPLES | tiny.LINEAR | {"model_type": "qwen3_5_text"}, QWEN3_VISION),
    "gemma4": gemma4(tiny.GEMMA4),
    "gemma4 small": gemma4(tiny.GEMMA4_SMALL),
    "llama4": case("llama4", tiny.LLAMA4 | {"model_type": "llama4_text"}, LLAMA4_VISION, **ENDS),
    **{
        kind: case(
            kind,
            tiny.TRIPLES | QWEN_SIZES.get(kind, {}) | {"model_type": f"{kind}_text", "rope_parameters": TURNED},
            tower,
            vision_start_token_id=tiny.VOCAB - 2,
            video_token_id=tiny.VOCAB - 3,
        )
        for kind, tower in QWEN_TOWERS.items()
    },
}
SMALL: dict[str, Any] = {"calibration": "random", "samples": 12, "length": 16, "device": "cpu", "widths": "uniform"}
SMALL |= {"effort": "quick"}


def save(name: str, folder: Path) -> Path:
    """A tiny random model with a tower, and the files that go with it."""
    kind, keys = CASES[name]
    with quiet():
        config = AutoConfig.for_model(kind, **json.loads(json.dumps(keys)))
        # What a class draws itself, as the decay of linear attention, is the same every time as well.
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).float().eval()
        generator = torch.Generator().manual_seed(0)
        for value in model.parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.data.copy_(value.data + 0.3 * noise if value.dim() == 1 else noise * value.shape[-1] ** -0.5)
        model.save_pretrained(folder)
        make_letters().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "of the test"}')
    return folder


def opened(folder: Path, **how: Any) -> Any:
    how |= {"dtype": torch.float32, "output_loading_info": True}
    with quiet():
        model, info = AutoModelForImageTextToText.from_pretrained(folder, **how)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def keeps_of(out: Path) -> dict[int, KeptUnits]:
    """Return the units that a run has kept, from its secateur.json."""
    blocks = json.loads((out / "secateur.json").read_text())["blocks"]
    return {block["block"]: {kind: tuple(block.get(kind, ())) for kind in (*KINDS, "token_mixers")} for block in blocks}


@pytest.fixture(autouse=True)
def _llama4(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add an attribute that Llama 4's class in transformers 5.24 reads from its language model's outputs in vain."""
    monkeypatch.setattr(MoeCausalLMOutputWithPast, "image_outputs", None, raising=False)


def decoder(model: Any) -> Any:
    if model.config.model_type == "llama4":
        return model.language_model.model
    return model.model.text_model if model.config.model_type == "smolvlm" else model.model.language_model


def picture(kind: str, here: Tensor) -> dict[str, Tensor]:
    """Return the inputs of a model for a picture in each of two rows, which has some of their positions."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    if kind.startswith("qwen"):
        grid = torch.tensor([[1, 2, 2], [1, 2, 2]])
        return {"pixel_values": drawn(8, 48), "image_grid_thw": grid, "mm_token_type_ids": here}
    if kind == "gemma4":
        # Four by four patches, pooled two by two.
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(2, 16, 2)
        return {"pixel_values": drawn(2, 16, 48), "image_position_ids": places, "mm_token_type_ids": here}
    sizes = {"image_sizes": torch.tensor([[8, 8], [8, 8]])} if kind == "mistral3" else {}
    # With SmolVLM, each row has a list of pictures.
    shapes = {"llama4": (2, 3, 16, 16), "smolvlm": (2, 1, 3, 8, 8)}
    return {"pixel_values": drawn(*shapes.get(kind, (2, 3, 8, 8))), **sizes}


def logits(model: Any, image: bool, kept: Sequence[int] = range(tiny.VOCAB), renumbered: bool = False) -> Tensor:
    """Return the logits of rows of some tokens, which have new ids if the model's vocabulary was cut to them."""
    ids = torch.tensor(kept)[token_rows(2) % len(kept)]
    if image:
        ids[:, 3:7] = IMAGE
    more = picture(model.config.model_type, (ids == IMAGE).long()) if image else {}
    if renumbered:
        ids = torch.searchsorted(torch.tensor(kept), ids)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits


def check_masking(folder: Path, out: Path, *written: Any) -> None:
    """Check that written models compute what the dense model computes with the removed units silenced."""
    checkpoint = open_checkpoint(folder)
    dense, blocks = load(checkpoint, torch.float32, torch.device("cpu")), BlockStream(checkpoint).blocks
    for image in (False, True):
        with silenced(decoder(dense).layers, blocks, keeps_of(out)):
            wanted = logits(dense, image)
        assert all(relative(logits(small, image), wanted) < 1e-5 for small in written)
        assert relative(wanted, logits(dense, image)) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_fewer_tokens_give_the_same_logits(tmp_path, name):
    """With a picture too, whose token has a new id in config.json."""
    whole = open_checkpoint(save(name, tmp_path / "model"))
    # Added tokens of the tokenizer, from 120 on, are always kept.
    kept = sorted({token for token in range(tiny.VOCAB) if token % 3 or token >= 120} | ids_in_configs(whole))
    cut = load(cut_as_before(whole, kept), torch.float32, torch.device("cpu"))
    for image in (False, True):
        wanted = logits(opened(tmp_path / "model"), image, kept)[..., kept]
        assert relative(logits(cut, image, kept, renumbered=True), wanted) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_what_masking_gives(tmp_path, name):
    folder, out = save(name, tmp_path / "dense"), tmp_path / "out"
    prune(folder, out, **SMALL, sparsity=0.4, recovery="none")
    small = opened(out)
    assert type(small) is type(opened(folder))
    check_masking(folder, out, small)
    assert relative(logits(small, True), logits(small, False)) > 1e-3
    before, after = (load_file(path / "model.safetensors") for path in (folder, out))
    assert before.keys() == after.keys()
    tower = re.compile("vision|visual|project")
    others = [key for key in before if ".layers." not in key or tower.search(key)]
    assert any(map(tower.search, others))
    assert all(torch.equal(before[key], after[key]) for key in others)
    file = "preprocessor_config.json"
    assert (out / file).read_bytes() == (folder / file).read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_a_width_for_each_block(tmp_path, name):
    """A folder with a modeling file opens with the same auto class, and computes what silencing units gives."""
    folder, out = save(name, tmp_path / "dense"), tmp_path / "out"
    # Without channels of experts, of which so narrow ones have two sizes at most.
    kinds = ("heads", "experts") if name in ("mistral4", "llama4") else KINDS
    how = SMALL | {"widths": "adaptive", "modules": kinds}
    found = prune(folder, out, **how, sparsity=0.3, recovery="none")
    assert not found.uniform
    assert found.auto_class == "AutoModelForImageTextToText"
    written = [opened(out, trust_remote_code=True), load(open_checkpoint(out), torch.float32, torch.device("cpu"))]
    assert {type(small).__name__ for small in written} == {f"Secateur{type(opened(folder)).__name__}"}
    check_masking(folder, out, *written)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl_moe", "qwen2_vl"])
def test_a_folder_with_a_width_for_each_block_is_pruned_again(tmp_path, name):
    """Qwen2-VL's language model has a family of another name."""
    folders, how = [save(name, tmp_path / "dense")], SMALL | {"widths": "adaptive", "sparsity": 0.3, "recovery": "none"}
    for step in ("first", "second"):
        prune(folders[-1], tmp_path / step, **how)
        folders.append(tmp_path / step)
    check_masking(*folders[1:], opened(folders[-1], trust_remote_code=True))
    assert_error("cannot train multimodal models; name a language model", retrain, folders[-1], tmp_path / "out")


def rename_as_newer_checkpoints(folder: Path) -> set[str]:
    """Put `model.` in front of all names, where older checkpoints have the language model's own names inside."""
    newer = {}
    for key, value in load_file(folder / "model.safetensors").items():
        key = key.replace("language_model.model.", "language_model.").replace("language_model.lm_head", "lm_head")
        newer[key if key.startswith("lm_head") else f"model.{key}"] = value
    save_file(newer, folder / "model.safetensors", metadata={"format": "pt"})
    return set(newer)


def test_names_of_newer_checkpoints(tmp_path):
    folder = save("llava", tmp_path / "dense")
    newer = rename_as_newer_checkpoints(folder)
    opened(folder)
    prune(folder, tmp_path / "out", **SMALL, sparsity=0.4)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == newer
    opened(tmp_path / "out")


@pytest.mark.parametrize("name", QWEN_TOWERS)
def test_sections_of_positions_in_both_spellings(tmp_path, name):
    prune(save(name, tmp_path / "dense"), tmp_path / "out", **SMALL, sparsity=0.4)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert stored["model_type"] == f"{name}_text"
    assert stored["rope_parameters"] == TURNED
    # 4.57 reads these two.
    assert stored["rope_scaling"] | {"rope_theta": stored["rope_theta"]} == TURNED


def edit_config(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


@pytest.mark.parametrize("name", QWEN_TOWERS)
def test_twins_compute_the_same(tmp_path, name):
    """The config holds values that neither class has as a default."""
    folder = save(name, tmp_path / "dense")
    other = {"rms_norm_eps": 0.01, "rope_parameters": TURNED | {"rope_theta": 50.0}}
    edit_config(folder, lambda raw: raw | {"text_config": raw["text_config"] | other})
    checkpoint = open_checkpoint(folder)
    twin = AutoModelForCausalLM.from_config(checkpoint.config).float().eval()
    twin.load_state_dict({name: checkpoint.parameter(name).read() for name in twin.state_dict()})
    with torch.no_grad():
        assert relative(twin(token_rows(2)).logits, logits(opened(folder), False)) < 1e-6


def write_config_of_older_checkpoints(folder: Path, theta: float) -> None:
    """Put the language model's keys among all others, and name the sections of positions, as Qwen2-VL's own config."""

    def older(raw: dict[str, Any]) -> dict[str, Any]:
        inside = raw.pop("text_config")
        sections = inside.pop("rope_parameters")["mrope_section"]
        inside |= {"rope_theta": theta, "rope_scaling": {"type": "mrope", "mrope_section": sections}}
        return inside | raw | {"tie_word_embeddings": False}

    edit_config(folder, older)


@pytest.mark.parametrize("widths", ["uniform", "adaptive"])
def test_configs_of_older_checkpoints(tmp_path, widths):
    folder, out = save("qwen2_vl", tmp_path / "dense"), tmp_path / "out"
    # No default of any class.
    write_config_of_older_checkpoints(folder, theta=5000.0)
    assert opened(folder).config.text_config.rope_parameters["rope_theta"] == 5000.0
    prune(folder, out, **SMALL | {"widths": widths}, sparsity=0.4, recovery="none")
    stored = json.loads((out / "config.json").read_text())
    assert not {"hidden_size", "intermediate_size", "rope_scaling", "rope_theta"} & stored.keys()
    check_masking(folder, out, opened(out, trust_remote_code=True))


def turned(folder: Path) -> dict[str, Tensor]:
    """A folder's tensors, with matrices of experts the other way around."""
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor.mT.contiguous() if ".mlp.experts." in name else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("how", [{}, {"widths": "adaptive", "blocks": "1:"}])
def test_experts_that_are_stored_with_inputs_first(tmp_path, how):
    """Published checkpoints of Qwen3-VL hold them so."""
    folder = save("qwen3_vl_moe", tmp_path / "dense")
    prune(folder, tmp_path / "plain", **SMALL | how, sparsity=0.4)
    with edited_weights(folder) as tensors:
        tensors |= turned(folder)
    prune(folder, tmp_path / "out", **SMALL | how, sparsity=0.4)
    found, wanted = load_file(tmp_path / "out" / "model.safetensors"), turned(tmp_path / "plain")
    assert found.keys() == wanted.keys()
    experts = "model.language_model.layers.1.mlp.experts.gate_up_proj"
    assert found[experts].shape[1] == 48
    assert found[experts].numel() < load_file(folder / "model.safetensors")[experts].numel()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    small, plain = (opened(tmp_path / name, trust_remote_code=True) for name in ("out", "plain"))
    # The same weights in another layout may be multiplied in another order.
    assert relative(logits(small, True), logits(plain, True)) < 1e-6


def test_channels_of_experts_whose_direction_shapes_do_not_tell(tmp_path):
    stream = BlockStream(open_checkpoint(save("qwen3_vl_moe", tmp_path / "dense")))
    for format in ("hf", "stock"):
        reason = format_class(format)(stream).unsupported_reason
        assert reason(stream.blocks[0].width | {EXPERT_CHANNELS: 16}) is None
        assert reason(stream.blocks[0].width | {EXPERT_CHANNELS: 24})


def test_a_language_model_of_another_form(tmp_path):
    folder = save("llava", tmp_path / "dense")
    edit_config(folder, lambda raw: raw | {"text_config": raw["text_config"] | {"model_type": "mamba"}})
    said = r"multimodal model \(vision_config\) whose language model \(mamba\) is not"
    assert_error(said, prune, folder, tmp_path / "out", **SMALL)


@pytest.mark.parametrize("widths", ["adaptive", "uniform"])
def test_a_model_in_memory(tmp_path, widths):
    """Its parts keep their attention implementations."""
    parts = {"": "sdpa", "text_config": "eager", "vision_config": "sdpa"}
    with quiet():
        model = AutoModelForImageTextToText.from_pretrained(save("llava", tmp_path / "in"), attn_implementation=parts)
    found = prune_model(model, None, **SMALL | {"widths": widths}, sparsity=0.3)
    configs = (found.config, found.config.text_config, found.config.vision_config)
    assert [config._attn_implementation for config in configs] == list(parts.values())
    assert found.num_parameters() < model.num_parameters()
