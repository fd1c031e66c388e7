"""Arcee's AFM."""

from secateur.families.entry import Family, Gguf, Stock

FAMILIES = {"arcee": Family(gate=None, stock=Stock(head_counts="divisors"), gguf=Gguf(("arcee",)))}
