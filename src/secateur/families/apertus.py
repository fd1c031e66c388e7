"""The Swiss AI Initiative's Apertus."""

from secateur.families.entry import Family, Gguf

FAMILIES = {"apertus": Family(gate=None, activation="act_fn", gguf=Gguf(("apertus",)))}
