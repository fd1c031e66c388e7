"""All families by model_type, out of the files that `secateur.base.names` lists: a new family is one entry in one.

A file declares `FAMILIES`, entries by model_type, and may declare `TWINS`, decoders inside multimodal models.
"""

import json
import weakref
from typing import Any

from secateur.base.errors import SecateurError
from secateur.base.hashes import hash_json
from secateur.base.names import LINEAGES, find
from secateur.families.entry import Experts, Family, Gguf, Twin

FAMILIES: dict[str, Family] = {}
"""Entries by model_type."""
TWINS: dict[str, Twin] = {}
"""Decoders inside multimodal models by model_type."""
for lineage in map(find, LINEAGES.values()):
    # An entry of another package, whose lineages come last, replaces none of secateur's own.
    FAMILIES |= {name: entry for name, entry in lineage.FAMILIES.items() if name not in FAMILIES}
    TWINS |= {name: twin for name, twin in getattr(lineage, "TWINS", {}).items() if name not in TWINS}


_DERIVED: dict[str, Family | SecateurError] = {}
"""Derived entries, and the reasons why there are none, by a hash of the config."""
_OF_CONFIG: dict[int, tuple[Any, Family]] = {}
"""Derived entries by the identity of the config object, with a reference to it."""


def family_of(config: Any) -> Family:
    """Return the entry for a config; without one, it is derived from the config's class.

    Raises:
        SecateurError: The model cannot be pruned; with the reason that was found.
    """
    known = _OF_CONFIG.get(id(config))
    if known is not None and known[0]() is config:
        return known[1]
    family = FAMILIES.get(config.model_type)
    return family or assume(config, _derived(config))


def known_family(config: Any) -> Family | None:
    """Return the entry for a config as `family_of` does; None if the model cannot be pruned."""
    try:
        return family_of(config)
    except SecateurError:
        return None


def assume(config: Any, family: Family) -> Family:
    """Let a config object have an entry, and return the entry."""
    _OF_CONFIG[id(config)] = weakref.ref(config), family
    return family


def _derived(config: Any) -> Family:
    kind = type(config)
    digest = hash_json([kind.__module__, kind.__name__, json.loads(json.dumps(config.to_dict(), default=str))])
    if digest not in _DERIVED:
        # Found here, so that a model with an entry is opened without this code.
        derive = find("secateur.layout.derive:derive")
        try:
            _DERIVED[digest] = derive(config)
        except SecateurError as error:
            _DERIVED[digest] = error
    found = _DERIVED[digest]
    if isinstance(found, SecateurError):
        raise found
    return found


def twin_of(config: Any) -> Twin | None:
    """Return the twin that a config replaces; None if the config is the checkpoint's own."""
    return TWINS.get(getattr(config, "twin_of", ""))


def experts_of(config: Any) -> Experts | None:
    """Return the entry of a model's experts; None if the family has none or the config asks for none."""
    found = family.experts if (family := known_family(config)) else None
    return found if found and getattr(config, found.number, None) else None


def gguf_of(config: Any) -> Gguf:
    """Return the GGUF entry of a model: its twin's entry if it has a twin, else its family's."""
    twin = twin_of(config)
    return family_of(config).gguf if twin is None else twin.gguf
