"""All entries by model_type, out of the files that `secateur.base.names` lists, and the descriptions of models.

A file declares `FAMILIES`, entries by model_type, and may declare `TWINS`, decoders inside multimodal models.
"""

import weakref
from typing import Any

from secateur.base.errors import SecateurError
from secateur.base.names import LINEAGES, find
from secateur.families.entry import Entry, Gguf, Stock, Twin
from secateur.families.family import Experts, Family

FAMILIES: dict[str, Entry] = {}
"""Entries by model_type."""
TWINS: dict[str, Twin] = {}
"""Decoders inside multimodal models by model_type."""
for lineage in map(find, LINEAGES.values()):
    # An entry of another package, whose lineages come last, replaces none of secateur's own.
    FAMILIES |= {name: entry for name, entry in lineage.FAMILIES.items() if name not in FAMILIES}
    TWINS |= {name: twin for name, twin in getattr(lineage, "TWINS", {}).items() if name not in TWINS}

UNKNOWN = Entry(stock=Stock(theta_key=None))
"""Entry of all other families: their configs have one spelling."""
_OF_CONFIG: dict[int, tuple[Any, Family]] = {}
"""Descriptions by the identity of the config object, with a reference to it."""


def family_of(config: Any) -> Family:
    """Return the description of the blocks of a model, which is derived from its class.

    Raises:
        SecateurError: The model cannot be pruned; with the reason that was found.
    """
    known = _OF_CONFIG.get(id(config))
    if known is not None and known[0]() is config:
        return known[1]
    entry = FAMILIES.get(config.model_type, UNKNOWN)
    if not entry.derived:
        return assume(config, Family(**entry.stated, entry=entry))
    # Found here, because descriptions are derived with the help of all that reads them.
    return assume(config, find("secateur.layout.derive:derive")(config, entry))


def known_family(config: Any) -> Family | None:
    """Return the description as `family_of` does; None if the model cannot be pruned."""
    try:
        return family_of(config)
    except SecateurError:
        return None


def assume(config: Any, family: Family) -> Family:
    """Let a config object have a description, and return the description."""
    _OF_CONFIG[id(config)] = weakref.ref(config), family
    return family


def twin_of(config: Any) -> Twin | None:
    """Return the twin that a config replaces; None if the config is the checkpoint's own."""
    return TWINS.get(getattr(config, "twin_of", ""))


def experts_of(config: Any) -> Experts | None:
    """Return the description of a model's experts; None if it has none."""
    found = family.experts if (family := known_family(config)) else None
    return found if found and getattr(config, found.number, None) else None


def gguf_of(config: Any) -> Gguf:
    """Return the GGUF entry of a model: its twin's entry if it has a twin, else its family's."""
    twin = twin_of(config)
    return family_of(config).entry.gguf if twin is None else twin.gguf
