"""MBZUAI's Jais 2."""

from secateur.families.entry import Family, Gguf

FAMILIES = {"jais2": Family(gate=None, gguf=Gguf(("jais2",), epsilon="layer_norm_eps"))}
