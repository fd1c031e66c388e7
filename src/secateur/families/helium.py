"""Kyutai's Helium."""

from secateur.families.entry import Family, Gguf, Stock

FAMILIES = {"helium": Family(stock=Stock(head_counts="dense"), gguf=Gguf(("llama", "deci"), interleaved_rope=True))}
