"""Names of tensors: llama.cpp's name of each of transformers' tensors, for files that are written and read."""

import re
from functools import cache
from typing import Any

import gguf

_SPELLINGS = {
    "correction_bias": "correction.bias",
    ".sinks": ".sinks.weight",
    ".expert_bias": ".expert_bias.bias",
    ".dt_bias": ".dt_proj.bias",
    "layer_scalar": "layer_scalar.weight",
}
"""Parts of transformers' names of tensors, with their spelling in the gguf package's table."""
_UNLISTED = {
    r".*\.(\d+)\.router\.scale": r"blk.\1.ffn_gate_inp.scale",
    r".*\.(\d+)\.router\.per_expert_scale": r"blk.\1.ffn_down_exps.scale",
}
"""Patterns of transformers' names that the gguf package does not list (Gemma 4), with llama.cpp's names."""


def gguf_name(architecture: str, blocks: int, name: str) -> str | None:
    """Return llama.cpp's name of a tensor; None if the architecture has no place for it.

    Args:
        architecture: llama.cpp's name of the architecture.
        blocks: Number of blocks of the model.
        name: transformers' name of the tensor in the whole model.
    """
    for pattern, unlisted in _UNLISTED.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(unlisted)
    for part, spelling in _SPELLINGS.items():
        name = name.replace(part, spelling)
    # The table lists Bloom's tensors without the name of the model.
    names = (name, name.removeprefix("transformer."))
    found = (_table(architecture, blocks).get_name(one, (".weight", ".bias")) for one in names)
    return next(filter(None, found), None)


@cache
def _table(architecture: str, blocks: int) -> Any:
    """Return the gguf package's table from transformers' names to llama.cpp's."""
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(number, blocks)
