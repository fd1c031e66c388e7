"""Positions in GGUF files, written and read: rotary settings and sliding windows.

Rotary settings are metadata, and tensors of factors by which frequencies are divided. `rope_metadata` and
`rope_tensors` convert a config's settings to metadata and tensors; `read_rope` and `read_family_rope` convert metadata
and tensors to a config's settings.

The pattern of windows is a list with one flag per block, or a number n: the last of every n blocks has no window; 0
means that all blocks have one.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from secateur.base.errors import SecateurError
from secateur.families.entry import GgufInput
from secateur.families.registry import family_of


def has_window(pattern: int, index: int) -> bool:
    """Return whether a block has a window, by the pattern's number."""
    return not pattern or index % pattern < pattern - 1


def pattern_of(windows: Sequence[bool]) -> int | None:
    """Return the smallest number that describes which blocks have a window; None if there is no such number."""
    blocks = range(len(windows))
    described = (n for n in range(len(windows) + 1) if list(windows) == [has_window(n, index) for index in blocks])
    return next(described, None)


def layer_types(metadata: dict[str, Any], blocks: int) -> list[str]:
    """Return the type of attention of each block, as configs name it; an empty list if metadata do not state it."""
    pattern = metadata.get("attention.sliding_window_pattern", [])
    windows = pattern if isinstance(pattern, list) else [has_window(pattern, index) for index in range(blocks)]
    return ["sliding_attention" if window else "full_attention" for window in windows[:blocks]]


FREQUENCY_FACTORS, LONG_FACTORS, SHORT_FACTORS = FACTORS = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)
"""Names of tensors that hold no weights but the numbers by which rotary frequencies are divided."""
NO_ROTATION = 1e30
"""Divisor that makes a frequency practically zero, so that the entries of this frequency do not rotate."""

_LATENT_SCALE = "rope.scaling.yarn_log_multiplier"
"""Metadata key of a tenth of YaRN's `mscale`. With latent attention, llama.cpp multiplies attention scores by the
square of YaRN's scale, and does not multiply rotated entries by the scale."""

Numbers = dict[str, Any]
"""Metadata or rotary settings, by key."""


def rope_of(config: Any) -> Numbers:
    """Return the rotary settings of layers without a window; empty without rotary embeddings."""
    rope: Numbers = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention", rope)


def window_rope_of(config: Any) -> Numbers:
    """Return the rotary settings of layers with a window; empty if all layers have the same settings."""
    return (getattr(config, "rope_parameters", None) or {}).get("sliding_attention", {})


def rope_kind(config: Any) -> str:
    """Return the kind of rotary scaling, as transformers calls it."""
    return str(rope_of(config).get("rope_type", "default"))


def _yarn_scale(factor: float) -> float:
    """Return llama.cpp's factor on rotated queries and keys with YaRN, to which a file may add a factor of its own."""
    return 0.1 * math.log(factor) + 1


Sections = Literal["consecutive", "interleaved"]
"""Order of a head's frequencies for the time, height and width of a picture. `consecutive`: all frequencies for time,
then all for height, then all for width. `interleaved`: time, height and width in turn. A token of a text has the same
position for all three."""


def rope_metadata(config: Any, rotated: int, sections: Sections | None) -> Numbers:
    """Return a file's metadata about rotary embeddings, by keys without the architecture. Keys with the value None are
    not written.

    Args:
        config: The config object.
        rotated: Number of rotated entries of a head.
        sections: Order of the frequencies for pictures; None if the model has no sections (`mrope_section`).
    """
    if not (rope := rope_of(config)):
        return {}
    kind = rope_kind(config)
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    beta = rope.get("llama_4_scaling_beta")
    return {
        "rope.dimension_count": rotated,
        "rope.dimension_sections": [*_sections(rope, rotated, sections), 0] if sections else None,
        "rope.freq_base": _base(rope, rotated),
        "rope.freq_base_swa": float_or_none(window_rope_of(config).get("rope_theta")),
        "attention.temperature_scale": float_or_none(beta),
        "attention.temperature_length": original if beta else None,
        "rope.scaling.original_context_length": original if beta or kind in ("yarn", "longrope") else None,
        **_scaling_metadata(config),
    }


def _base(rope: Numbers, rotated: int) -> float:
    """Return the base of the frequencies; Hunyuan raises it by a fixed `alpha`, which llama.cpp does not read."""
    alpha = rope.get("alpha") if rope.get("rope_type") == "dynamic" else None
    factor = alpha ** (rotated / (rotated - 2)) if alpha else 1.0
    return float(rope["rope_theta"] * factor)


def _sections(rope: Numbers, rotated: int, sections: Sections) -> list[int]:
    """Return the numbers of frequencies for time, height and width."""
    stored = rope.get("mrope_section")
    if sections == "consecutive":
        # 16, 24 and 24 are the default of transformers' class.
        return stored or [16, 24, 24]
    thirds = [(rotated // 2 + 2 - axis) // 3 for axis in range(3)]
    # For frequencies beyond the sections, transformers uses the time, and llama.cpp a position that is 0 for all
    # tokens. So the sections must include all frequencies.
    return [max(pair) for pair in zip(thirds, stored or thirds, strict=False)]


def float_or_none(value: Any) -> float | None:
    """Return a number as a float; None for None and for zero."""
    return float(value) if value else None


def _scaling_metadata(config: Any) -> Numbers:
    """Return the metadata of the rotary scaling."""
    rope, kind = rope_of(config), rope_kind(config)
    if kind == "linear":
        return {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind not in ("longrope", "yarn"):
        return {}
    # The factor by which transformers multiplies rotated queries and keys.
    layer_type = {} if rope is config.rope_parameters else {"layer_type": "full_attention"}
    attention = float(ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=1, **layer_type)[1])
    if kind == "longrope":
        return {"rope.scaling.type": kind, "rope.scaling.attn_factor": attention}
    latent = {_LATENT_SCALE: 0.1 * (rope.get("mscale_all_dim") or 0.0)}
    usual = {"rope.scaling.attn_factor": attention / _yarn_scale(rope["factor"])}
    return {
        "rope.scaling.type": kind,
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.yarn_beta_fast": float_or_none(rope.get("beta_fast")),
        "rope.scaling.yarn_beta_slow": float_or_none(rope.get("beta_slow")),
        **(usual if family_of(config).latent is None else latent),
    }


def rope_tensors(config: Any, dim: int) -> dict[str, Tensor]:
    """Return the tensors of factors that a file holds, by llama.cpp's names.

    Args:
        config: The config object.
        dim: Entries per head in layers without a window.
    """
    rope, kind = rope_of(config), rope_kind(config)
    if kind == "longrope":
        names = {LONG_FACTORS: "long_factor", SHORT_FACTORS: "short_factor"}
        return {name: torch.tensor(rope[key], dtype=torch.float32) for name, key in names.items()}
    if kind == "proportional":
        factors = torch.full((dim // 2,), NO_ROTATION)
        factors[: int(dim // 2 * rope.get("partial_rotary_factor", 1.0))] = rope.get("factor", 1.0)
        return {FREQUENCY_FACTORS: factors}
    if kind == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        plain = rope["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        return {FREQUENCY_FACTORS: plain / scaled}
    return {}


def read_rope(config: Any, metadata: Numbers, factors: Numbers) -> None:
    """Add the rotary settings of a file to a config, in place.

    Args:
        config: The config object.
        metadata: The file's metadata, by keys without the architecture.
        factors: The file's tensors among `FACTORS`, in float64.

    Raises:
        SecateurError: No config can describe the file's rotary settings.
    """
    if (rope := getattr(config, "rope_parameters", None)) is None:
        return
    windows, rope = rope.get("sliding_attention", {}), rope.get("full_attention", rope)
    if windows and "rope.freq_base_swa" in metadata:
        windows["rope_theta"] = metadata["rope.freq_base_swa"]
    if rope.get("rope_type") == "proportional":
        rope |= _read_proportional(metadata, factors)
        return
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = metadata.get("rope.dimension_count", size)
    if rotated != size:
        rope["partial_rotary_factor"] = rotated / size
    rope |= _read_scaling(metadata, factors, config.max_position_embeddings, rope["rope_theta"], rotated)


def _read_scaling(metadata: Numbers, factors: Numbers, positions: int, theta: float, rotated: int) -> Numbers:
    """Return the settings of a file's rotary scaling.

    Args:
        metadata: The file's metadata, by keys without the architecture.
        factors: The file's tensors among `FACTORS`, in float64.
        positions: Number of positions that the model allows.
        theta: Base of the frequencies.
        rotated: Number of rotated entries of a head.

    Raises:
        SecateurError: No config can describe the scaling.
    """
    # Older files have another key for the factor, and do not state the kind of scaling.
    factor = float(metadata.get("rope.scaling.factor") or metadata.get("rope.scale_linear") or 1.0)
    original = int(metadata.get("rope.scaling.original_context_length") or positions)
    attention = float(metadata.get("rope.scaling.attn_factor", 1.0))
    kind = str(metadata.get("rope.scaling.type", "none" if factor == 1 else "linear"))
    if len(factors) == 1:
        return {"rope_type": "llama3", **llama3_settings(factors[FREQUENCY_FACTORS], theta, rotated)}
    if len(factors) == 2:
        return {
            "rope_type": "longrope",
            "original_max_position_embeddings": original,
            "factor": positions / original,
            "long_factor": factors[LONG_FACTORS].tolist(),
            "short_factor": factors[SHORT_FACTORS].tolist(),
            "attention_factor": attention,
        }
    if kind == "yarn":
        betas = {f"beta_{end}": metadata.get(f"rope.scaling.yarn_beta_{end}") for end in ("fast", "slow")}
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "attention_factor": attention * _yarn_scale(factor),
            **{key: float(value) for key, value in betas.items() if value is not None},
        }
    if kind not in ("none", "linear"):
        raise SecateurError(f"its rotary scaling {kind!r} is not known to secateur")
    return {} if kind == "none" else {"rope_type": "linear", "factor": factor}


def read_family_rope(config: Any, metadata: Numbers, input: GgufInput) -> None:
    """Add rotary settings that only some families have to a config, in place; to be called after `read_rope`.

    Args:
        config: The config object.
        metadata: The file's metadata, by keys without the architecture.
        input: The family's entry for reading GGUF files.

    Raises:
        SecateurError: The model's class does not support a setting in the metadata.
    """
    rope = config.rope_parameters
    if sections := metadata.get("rope.dimension_sections"):
        # Engines require the sections even in models for text alone.
        rope |= {"mrope_section": sections[:3], "mrope_interleaved": True}
    if beta := metadata.get("attention.temperature_scale"):
        if not input.scales_queries:
            raise SecateurError(f"{config.model_type} cannot scale queries with their positions, as its metadata ask")
        rope["llama_4_scaling_beta"] = beta
    if rope.get("rope_type") == "yarn" and family_of(config).latent is not None:
        if not (scale := metadata.get(_LATENT_SCALE)):
            raise SecateurError("its yarn has no yarn_log_multiplier, so that it scales rotated entries")
        del rope["attention_factor"]
        rope |= dict.fromkeys(("mscale", "mscale_all_dim"), round(scale * 10, 6))


def llama3_settings(factors: Any, theta: float, rotated: int) -> Numbers:
    """Return settings of Llama 3.1's scaling that give the factors in a file.

    A frequency is divided by 1 / ((1 - s) / factor + s), where s = (original / wavelength - low) / (high - low) is
    clipped to the range from 0 to 1. The same factors follow when original, low and high are multiplied by one number,
    so low is set to 1. The settings may therefore differ from those in the original model's config, but give the same
    factors.

    Args:
        factors: The file's factors, one for each pair of rotated entries.
        theta: Base of the frequencies.
        rotated: Number of rotated entries of a head.

    Raises:
        SecateurError: No such settings give the factors.
    """
    wavelengths = 2 * np.pi * theta ** (np.arange(0, rotated, 2) / rotated)
    factor = round(float(factors.max()), 5)
    if len(factors) != len(wavelengths) or factor <= 1:
        raise SecateurError("its rotary factors (rope_freqs) are not like those of Llama 3.1")
    share = (1 / factors - 1 / factor) / (1 - 1 / factor)
    unclipped = (share > 1e-4) & (share < 1 - 1e-4)
    high, original = 4.0, 0
    if unclipped.sum() > 1:
        slope, start = np.polyfit(1 / wavelengths[unclipped], share[unclipped], 1)
        high = round(float(1 - 1 / start), 3)
        original = round(float(slope * (high - 1)))
    elif unclipped.any():
        original = round(float((wavelengths * (share * (high - 1) + 1))[unclipped][0]))
    computed = np.clip((original / wavelengths - 1) / (high - 1), 0, 1)
    if not np.allclose(1 / ((1 - computed) / factor + computed), factors, rtol=1e-3):
        raise SecateurError("its rotary factors (rope_freqs) are not like those of Llama 3.1")
    return {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _read_proportional(metadata: Numbers, factors: Numbers) -> Numbers:
    """Return the settings of Gemma 4's layers without a window: the share of frequencies that rotate, and their factor.

    Raises:
        SecateurError: No such settings give the factors.
    """
    stored = factors.get(FREQUENCY_FACTORS, np.empty(0))
    rotating = stored[stored < NO_ROTATION / 2]
    share = len(rotating) / max(1, len(stored))
    computed = np.full(len(stored), NO_ROTATION)
    computed[: int(len(stored) * share)] = rotating[:1]
    suits = (
        len(rotating) > 0,
        np.array_equal(computed.astype(np.float32), stored.astype(np.float32)),
        # Files state that all entries of a head rotate; some of them do so with the frequency zero.
        all(
            metadata.get(f"rope.dimension_count{at}") == metadata.get(f"attention.key_length{at}")
            for at in ("", "_swa")
        ),
        metadata.get("rope.scaling.type", "none") == "none",
        "rope.scale_linear" not in metadata,
        len(stored) * 2 == metadata.get("attention.key_length"),
    )
    if not all(suits):
        raise SecateurError("its rotary factors (rope_freqs) are not like those of Gemma 4")
    factor = float(rotating[0])
    return {"partial_rotary_factor": share} | ({"factor": factor} if factor != 1 else {})
