"""MBZUAI's Jais 2."""

from secateur.families.entry import Family, Gguf, Stock

FAMILIES = {
    "jais2": Family(gate=None, stock=Stock(head_counts="divisors"), gguf=Gguf(("jais2",), epsilon="layer_norm_eps"))
}
