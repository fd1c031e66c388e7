"""Arcee's AFM."""

from secateur.families.entry import Family, Gguf, Stock

FAMILIES = {"arcee": Family(gate=None, stock=Stock(heads="divisors"), gguf=Gguf(("arcee",)))}
