"""Kyutai's Helium."""

from secateur.families.entry import Family, Gguf, Stock

FAMILIES = {"helium": Family(stock=Stock(heads="dense"), gguf=Gguf(("llama", "deci"), pairs=True))}
