"""Arcee's AFM."""

from secateur.families.entry import Family, Gguf

FAMILIES = {"arcee": Family(gate=None, gguf=Gguf(("arcee",)))}
