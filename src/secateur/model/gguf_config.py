"""What transformers leaves out of a config that it makes of a GGUF file: rotations, windows, scales, caps.

Left out, these change what the model computes without a word. Here they are read from the file's metadata, and from
the tensors of rotary factors, as llama.cpp reads them; and what has no place in the config is refused.
"""

import math
from collections.abc import Collection
from typing import Any

import numpy as np
from gguf import GGUFReader

from secateur.base.errors import SecateurError
from secateur.families.entry import Gguf
from secateur.families.registry import FAMILIES
from secateur.model.gguf_layout import STILL

FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are no weights: by how much each frequency is divided."""


def complete(config: Any, reader: GGUFReader) -> None:
    """Put into a config, in place, what transformers has not taken over; `SecateurError` for what no config holds."""
    facts, gguf = facts_of(reader), FAMILIES[config.model_type].gguf if config.model_type in FAMILIES else Gguf()
    factors = {
        tensor.name: np.asarray(tensor.data, dtype=np.float64) for tensor in reader.tensors if tensor.name in FACTORS
    }
    # Where heads share a latent vector, it is the length of that; in Gemma 4, of blocks without a window.
    other = {"attention.kv_lora_rank", "attention.key_length_swa"} & facts.keys()
    if "attention.key_length" in facts and not other and hasattr(config, "head_dim"):
        config.head_dim = facts["attention.key_length"]
    for key, own in gguf.left_out.items():
        if facts.get(key):
            setattr(config, own, facts[key])
    _complete_rotation(config, facts, factors)
    if gguf.deepest is not None:
        config.layer_types = windows_of(facts, config.num_hidden_layers) or config.layer_types
        deepest = config.num_hidden_layers == gguf.deepest
        per_head = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = per_head if deepest else config.head_dim
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if key in facts:
            setattr(config, key, facts[key] or None)


def known_name(name: str) -> str:
    """What the gguf package calls a checkpoint's tensor where it does not know it by its name."""
    for own, known in _KNOWN.items():
        name = name.replace(own, known)
    return name


_KNOWN = {
    "correction_bias": "correction.bias",
    ".sinks": ".sinks.weight",
    ".expert_bias": ".expert_bias.bias",
    ".dt_bias": ".dt_proj.bias",
    "layer_scalar": "layer_scalar.weight",
}


def facts_of(reader: GGUFReader) -> dict[str, Any]:
    """What a file says of its architecture, by keys without its name."""
    start = f"{reader.fields['general.architecture'].contents()}."
    return {key.removeprefix(start): field.contents() for key, field in reader.fields.items() if key.startswith(start)}


def check_read(model: Any, reader: GGUFReader, missing: Collection[str]) -> None:
    """Raise `SecateurError` unless every weight of a file has become one of the model's, and the other way around.

    Those that transformers does not find it fills with random numbers, without a word.
    """
    if missing:
        raise SecateurError(f"transformers does not find {min(missing)} in it")
    stored = sum(int(tensor.n_elements) for tensor in reader.tensors if tensor.name not in FACTORS)
    read = sum(parameter.numel() for parameter in model.parameters())
    if stored != read:
        raise SecateurError(
            f"of its {stored:,} weights transformers makes a model with {read:,}"
            + (", without its biases" if any(tensor.name.endswith(".bias") for tensor in reader.tensors) else "")
        )


def _complete_rotation(config: Any, facts: dict[str, Any], factors: dict[str, Any]) -> None:
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        return
    around, rope = rope.get("sliding_attention"), rope.get("full_attention", rope)
    if around is not None and "rope.freq_base_swa" in facts:
        around["rope_theta"] = facts["rope.freq_base_swa"]
    if rope.get("rope_type") == "proportional":
        rope |= _proportional(facts, factors)
        return
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = facts.get("rope.dimension_count", size)
    if rotated != size:
        rope["partial_rotary_factor"] = rotated / size
    # Older files have another name for the factor, and name no kind.
    factor = float(facts.get("rope.scaling.factor") or facts.get("rope.scale_linear") or 1.0)
    kind = facts.get("rope.scaling.type", "none" if factor == 1 else "linear")
    before = facts.get("rope.scaling.original_context_length")
    if len(factors) == 2:
        longest = config.max_position_embeddings
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": before or longest}
        rope |= {"factor": longest / rope["original_max_position_embeddings"]}
        rope |= {f"{name}_factor": factors[f"rope_factors_{name}.weight"].tolist() for name in ("long", "short")}
        rope["attention_factor"] = float(facts.get("rope.scaling.attn_factor", 1.0))
    elif factors:
        rope |= {"rope_type": "llama3"} | _llama3(factors[FACTORS[0]], rope["rope_theta"], rotated)
    elif kind == "linear":
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor}
        rope["original_max_position_embeddings"] = before or config.max_position_embeddings
        # llama.cpp multiplies by this formula, and by the factor of the file.
        usual = 0.1 * math.log(factor) + 1
        rope["attention_factor"] = float(facts.get("rope.scaling.attn_factor", 1.0)) * usual
        rope |= {
            f"beta_{end}": float(facts[f"rope.scaling.yarn_beta_{end}"])
            for end in ("fast", "slow")
            if f"rope.scaling.yarn_beta_{end}" in facts
        }
    elif kind != "none":
        raise SecateurError(f"rotary scaling of the kind {kind} is not known here")


def _llama3(factors: Any, theta: float, rotated: int) -> dict[str, Any]:
    """The settings behind the factors of Llama 3.1's rotation.

    A frequency is divided by (1 - s) / factor + s, inverted, where s = (original / wavelength - low) / (high - low) is
    cut off at 0 and 1. Original, low and high may all be multiplied by one number: low is taken for 1. Settings that
    give these factors again are right, whatever they were.
    """
    wavelengths = 2 * np.pi * theta ** (np.arange(0, rotated, 2) / rotated)
    factor = round(float(factors.max()), 5)
    if len(factors) != len(wavelengths) or factor <= 1:
        raise SecateurError("its rotary factors (rope_freqs) are none of Llama 3.1's kind")
    share = (1 / factors - 1 / factor) / (1 - 1 / factor)
    inside = (share > 1e-4) & (share < 1 - 1e-4)
    high, original = 4.0, 0
    if inside.sum() > 1:
        slope, start = np.polyfit(1 / wavelengths[inside], share[inside], 1)
        high = round(float(1 - 1 / start), 3)
        original = round(float(slope * (high - 1)))
    elif inside.any():
        original = round(float((wavelengths * (share * (high - 1) + 1))[inside][0]))
    again = np.clip((original / wavelengths - 1) / (high - 1), 0, 1)
    if not np.allclose(1 / ((1 - again) / factor + again), factors, rtol=1e-3):
        raise SecateurError("its rotary factors (rope_freqs) are none of Llama 3.1's kind")
    return {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _proportional(facts: dict[str, Any], factors: dict[str, Any]) -> dict[str, Any]:
    """The settings behind the factors of Gemma 4's blocks without a window: how many frequencies turn anything, and by
    what they are divided."""
    divided = factors.get(FACTORS[0], np.empty(0))
    turning = divided[divided < STILL / 2]
    share = len(turning) / max(1, len(divided))
    # All of a head is in the rotation, of which a part stays where it is.
    whole = all(facts.get(f"rope.dimension_count{at}") == facts.get(f"attention.key_length{at}") for at in ("", "_swa"))
    again = np.full(len(divided), STILL)
    again[: int(len(divided) * share)] = turning[:1]
    alike = len(turning) and np.array_equal(again.astype(np.float32), divided.astype(np.float32))
    scaled = facts.get("rope.scaling.type", "none") != "none" or "rope.scale_linear" in facts
    if not whole or not alike or scaled or len(divided) * 2 != facts.get("attention.key_length"):
        raise SecateurError("its rotary factors (rope_freqs) are none of Gemma 4's kind")
    factor = float(turning[0])
    return {"partial_rotary_factor": share} | ({"factor": factor} if factor != 1 else {})


def windows_of(facts: dict[str, Any], blocks: int) -> list[str] | None:
    """Which blocks see everything: every so many-th one, none, or those of a list; None where the file does not say."""
    pattern = facts.get("attention.sliding_window_pattern")
    if pattern is None:
        return None
    sliding = (
        pattern[:blocks]
        if isinstance(pattern, list)
        else [not pattern or i % pattern < pattern - 1 for i in range(blocks)]
    )
    return ["sliding_attention" if one else "full_attention" for one in sliding]
