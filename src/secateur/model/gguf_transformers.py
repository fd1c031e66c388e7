"""Completion and check of what transformers itself reads from a GGUF file.

transformers does not read all rotary settings, windows, scales and softcaps of a file into the config, and without them
the model computes something else. This file adds them, read from metadata and factor tensors as llama.cpp reads them.
"""

from collections.abc import Collection
from typing import Any

import numpy as np
from gguf import GGUFReader

from secateur.base.errors import SecateurError
from secateur.families.entry import Family
from secateur.families.registry import FAMILIES
from secateur.model.gguf_file import metadata_of
from secateur.model.gguf_rope import FACTORS, read_rope
from secateur.model.gguf_windows import layer_types


def complete_config(config: Any, reader: GGUFReader) -> None:
    """Add to a config, in place, what transformers has not read from a file.

    Raises:
        SecateurError: No config can describe the file's rotary settings.
    """
    metadata, gguf = metadata_of(reader), FAMILIES.get(config.model_type, Family()).gguf
    factors = {
        tensor.name: np.asarray(tensor.data, dtype=np.float64) for tensor in reader.tensors if tensor.name in FACTORS
    }
    # With latent attention, attention.key_length is the size of the latent vector; in Gemma 4 it is the head size of
    # blocks without a window only.
    other_meaning = {"attention.kv_lora_rank", "attention.key_length_swa"} & metadata.keys()
    if "attention.key_length" in metadata and not other_meaning and hasattr(config, "head_dim"):
        config.head_dim = metadata["attention.key_length"]
    for key, name in gguf.not_read_by_transformers.items():
        setattr(config, name, metadata.get(key) or getattr(config, name))
    read_rope(config, metadata, factors)
    if gguf.blocks_of_27b is not None:
        config.layer_types = layer_types(metadata, config.num_hidden_layers) or config.layer_types
        is_27b = config.num_hidden_layers == gguf.blocks_of_27b
        per_head = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = per_head if is_27b else config.head_dim
    for cap in {"attn_logit_softcapping", "final_logit_softcapping"} & metadata.keys():
        setattr(config, cap, metadata[cap] or None)


def check_read(model: Any, reader: GGUFReader, missing: Collection[str]) -> None:
    """Check that every weight of a file has become one of the model's.

    transformers fills parameters that it does not find with random numbers, and reports no weights that it skips.

    Args:
        model: The model that transformers made of the file.
        reader: The open file.
        missing: Names of parameters that transformers did not find.

    Raises:
        SecateurError: A weight is missing or left over.
    """
    if missing:
        raise SecateurError(f"transformers cannot find {min(missing)} in it")
    stored = sum(int(tensor.n_elements) for tensor in reader.tensors if tensor.name not in FACTORS)
    read = sum(parameter.numel() for parameter in model.parameters())
    if stored != read:
        biased = any(tensor.name.endswith(".bias") for tensor in reader.tensors)
        raise SecateurError(
            f"transformers reads only {read:,} of its {stored:,} weights" + (", without the biases" if biased else "")
        )
