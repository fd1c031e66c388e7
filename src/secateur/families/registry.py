"""All families by model_type, out of the files that `secateur.base.names` lists: a new family is one entry in one.

A file declares `FAMILIES`, entries by model_type, and may declare `TWINS`, decoders inside multimodal models.
"""

from typing import Any

from secateur.base.errors import SecateurError
from secateur.base.names import LINEAGES, find
from secateur.families.entry import Experts, Family, Gguf, Twin

MECHANISMS = {
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok"),
    "latent attention": ("kv_lora_rank",),
    "layers of linear attention, convolution or state space": (
        *("linear_num_value_heads", "conv_L_cache", "mamba_d_state", "mamba_n_heads", "state_size", "ssm_cfg"),
        *("attention_hidden_size", "lru_width"),
    ),
}
"""Parts that blocks of an unknown family may have in addition to attention and feed-forward, by keys of configs."""


FAMILIES: dict[str, Family] = {}
"""Entries by model_type."""
TWINS: dict[str, Twin] = {}
"""Decoders inside multimodal models by model_type."""
for lineage in map(find, LINEAGES.values()):
    # An entry of another package, whose lineages come last, replaces none of secateur's own.
    FAMILIES |= {name: entry for name, entry in lineage.FAMILIES.items() if name not in FAMILIES}
    TWINS |= {name: twin for name, twin in getattr(lineage, "TWINS", {}).items() if name not in TWINS}


def family_of(config: Any) -> Family:
    """Return the entry for a config.

    Raises:
        SecateurError: The model_type has no entry; with what the model would need.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        mechanisms = [
            mechanism for mechanism, keys in MECHANISMS.items() if any(getattr(config, key, None) for key in keys)
        ]
        why = (
            f"it has {' and '.join(mechanisms)}, for which there is no code yet"
            if mechanisms
            else "if each block is an attention and a feed-forward, describe the family in a file and add --family "
            "FILE; see docs/extend.md"
        )
        raise SecateurError(
            f"model type '{config.model_type}' is not supported; secateur families prints those that are ({why})"
        )
    return family


def twin_of(config: Any) -> Twin | None:
    """Return the twin that a config replaces; None if the config is the checkpoint's own."""
    return TWINS.get(getattr(config, "twin_of", ""))


def experts_of(config: Any) -> Experts | None:
    """Return the entry of a model's experts; None if the family has none or the config asks for none."""
    found = family.experts if (family := FAMILIES.get(config.model_type)) else None
    return found if found and getattr(config, found.number, None) else None


def gguf_of(config: Any) -> Gguf:
    """Return the GGUF entry of a model: its twin's entry if it has a twin, else its family's."""
    twin = twin_of(config)
    return family_of(config).gguf if twin is None else twin.gguf
