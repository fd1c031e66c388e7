"""A GGUF file, written from start to end: metadata, tokenizer and tensors.

Metadata are made by keys without the architecture. Functions in `architecture.py` return metadata that only some
architectures have. Keys that only one family has are in the family's entry (`Gguf.keys`).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import ExpertGatingFuncType, GGUFReader, GGUFWriter

from secateur.base.progress import Watcher
from secateur.gguf.architecture import Architecture, nothing
from secateur.gguf.config import GATES_SUM_TO_ONE
from secateur.gguf.model import BlockSizes, GgufModel
from secateur.gguf.positions import float_or_none, rope_metadata
from secateur.gguf.tensors import FileTensor
from secateur.gguf.tokenizer import Vocabulary

Values = dict[str, Any]
_ADD = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}
"""Methods of the gguf package's writer, by the Python type of a value."""
_FLOATS = frozenset({"attention.scale", "embedding_scale", "residual_scale", "logit_scale", "attn_logit_softcapping"})
"""Keys of `Gguf.keys` whose values llama.cpp reads as floats, whatever type a config has."""
_DEEPSTACK = re.compile(r"\.deepstack_merger_list\.(\d+)\.")
"""Layers that turn intermediate states of a vision tower into inputs of the decoder's first blocks (Qwen3-VL)."""


def _add_metadata(writer: GGUFWriter, place: str, values: Values) -> None:
    """Add metadata to a file, by keys without their beginning `place`. Values of None are not written."""
    for key, value in values.items():
        # Only the keys of this activation have no architecture's name in front.
        name = key if key.startswith("xielu.") else f"{place}.{key}"
        if value is not None:
            getattr(writer, _ADD[type(value)])(name, value)


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Add a vocabulary to the metadata of a file."""
    _add_metadata(writer, "tokenizer.ggml", vocabulary.metadata)
    template = vocabulary.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def model_metadata(model: GgufModel, architecture: Architecture) -> Values:
    """Return the metadata of a model."""
    config, blocks = model.config, architecture.sizes(model)
    own = {key: getattr(config, name) for key, name in model.source.keys.items()}
    merged = {found[1] for name in model.checkpoint.tensors if (found := _DEEPSTACK.search(name))}
    return {
        "context_length": context_length(model, architecture),
        "embedding_length": config.hidden_size,
        "block_count": len(blocks),
        **_block_metadata(model, architecture, blocks),
        **architecture.attention(model),
        # The epsilon of norms without weights (OLMo) is a constant in the class.
        f"attention.{architecture.epsilon}": float(getattr(config, model.source.epsilon, 1e-5)),
        **{key: float(value) if key in _FLOATS else value for key, value in own.items()},
        **_expert_metadata(model, architecture),
        "attention.clamp_kqv": float_or_none(getattr(getattr(config, "attn_config", config), "clip_qkv", None)),
        # In this multimodal model, the decoder's first blocks get additional inputs from the vision tower.
        "n_deepstack_layers": len(merged) or None,
        "final_logit_softcapping": float_or_none(getattr(config, "final_logit_softcapping", None)),
        **architecture.windows(model),
        **rope_metadata(config, model.rotated, architecture.sections),
        **architecture.metadata(model),
    }


def context_length(model: GgufModel, architecture: Architecture) -> int:
    """Return the number of positions for which llama.cpp computes the same as the model.

    Beyond the model's window, an architecture without windows computes something else.
    """
    if architecture.windows is not nothing or model.window is None:
        return model.positions
    return min(model.positions, model.window)


def _block_metadata(model: GgufModel, architecture: Architecture, blocks: list[BlockSizes]) -> Values:
    """Return numbers of heads and channels: lists of one number per block, or numbers that all blocks share.

    A list is also needed if a block has no heads or no channels.
    """
    kv_heads, channels = list[int](), list[int]()
    for index, sizes in enumerate(blocks):
        # llama.cpp recognises blocks with a convolution by a zero, and blocks with linear attention by their distance.
        without = model.is_token_mixer(index) and not architecture.linear
        kv_heads.append(0 if without else 1 if model.family.latent else sizes.kv_heads)
        channels.append(_channels(model, sizes))
    numbers = {
        "attention.head_count": [sizes.heads for sizes in blocks],
        "attention.head_count_kv": kv_heads,
        "feed_forward_length": channels,
    }
    return {key: list_ if architecture.per_layer or 0 in list_ else list_[0] for key, list_ in numbers.items()}


def _channels(model: GgufModel, sizes: BlockSizes) -> int:
    """Return the channels of a block's feed-forward; for a block with experts, the number that a dense block would
    have."""
    if sizes.channels is not None:
        return sizes.channels
    is_own_key = model.experts.expert_width != "intermediate_size"
    return is_own_key * getattr(model.config, "intermediate_size", 0) or sizes.expert_channels


def _expert_metadata(model: GgufModel, architecture: Architecture) -> Values:
    """Return the metadata of a mixture of experts. For a model without experts, return the keys that its architecture
    needs."""
    if (first := model.first_experts) is None:
        dense = {
            "leading_dense_block_count": len(model.blocks),
            "expert_feed_forward_length": 0,
            "expert_shared_count": 0,
        }
        return dense if architecture.leading_dense else {}
    config, names, sizes = model.config, model.experts, model.blocks[first]
    per_token = getattr(config, names.experts_per_token)
    states_routing = architecture.name not in GATES_SUM_TO_ONE or architecture.states_routing
    return {
        "expert_count": sizes.experts,
        # A config may have a number per block.
        "expert_used_count": max(per_token) if isinstance(per_token, list) else per_token,
        "expert_feed_forward_length": sizes.expert_channels,
        "leading_dense_block_count": first if architecture.leading_dense else None,
        **_shared_expert_metadata(model, first),
        **(_routing_metadata(model) if states_routing else {}),
    }


def _shared_expert_metadata(model: GgufModel, first: int) -> Values:
    output = f"{model.family.feed_forward}.{model.experts.shared_expert}.down_proj.weight"
    if (stored := model.inside[first].get(output)) is None:
        return {}
    return {
        "expert_shared_feed_forward_length": model.checkpoint.tensors[stored].shape[1],
        "expert_shared_count": getattr(model.config, "n_shared_experts", 1),
    }


def _routing_metadata(model: GgufModel) -> Values:
    """Return how the router's logits become gates, and from how many groups of experts a token chooses."""
    groups, used = (getattr(model.config, key, None) or 1 for key in ("n_group", "topk_group"))
    # If a token may choose from all groups, the file states one group.
    groups, used = (groups, used) if used < groups else (1, 1)
    return {
        "expert_weights_norm": model.gates_sum_to_one,
        "expert_weights_scale": float(getattr(model.config, "routed_scaling_factor", 1.0)),
        "expert_gating_func": int(ExpertGatingFuncType[str(model.source.gating).upper()]),
        "expert_group_count": groups,
        "expert_group_used_count": used,
    }


def write_gguf(
    path: Path,
    model: GgufModel,
    architecture: Architecture,
    tensors: Sequence[FileTensor],
    vocabulary: Vocabulary,
    *,
    name: str,
    watcher: Watcher,
) -> None:
    """Write a file; one tensor at a time is in memory.

    Args:
        path: The file.
        model: The model to write.
        architecture: Result of `choose_architecture`.
        tensors: Result of `file_tensors`.
        vocabulary: Result of `vocabulary_of`.
        name: Name of the model, for people.
        watcher: Shows the progress.

    Raises:
        SecateurError: A weight is too large for the type.
    """
    writer = GGUFWriter(None, architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(vocabulary.safe_name(name))
    writer.add_file_type(model.storage.file)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(len(vocabulary.metadata["tokens"]))
    _add_metadata(writer, architecture.name, model_metadata(model, architecture))
    add_vocabulary(writer, vocabulary)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.values.shape, np.dtype(np.float32), tensor.bytes, tensor.type)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in watcher.track(tensors, "Writing"):
            writer.write_tensor_data(tensor.data())
    finally:
        writer.close()


def check_tensors(file: Path, expected: Sequence[FileTensor]) -> str | None:
    """Return the first difference between a file's tensors and the expected ones, as a clause, or None.

    The gguf package's reader opens the file, and reads no weights.
    """
    planned = {tensor.name: (list(tensor.values.shape), tensor.type) for tensor in expected}
    # GGUF lists the fastest axis first.
    found = {tensor.name: ([*map(int, tensor.shape[::-1])], tensor.tensor_type) for tensor in GGUFReader(file).tensors}
    name = next((name for name in {**planned, **found} if planned.get(name) != found.get(name)), None)
    return None if name is None else f"{name} is {found.get(name)}, expected {planned.get(name)}"
