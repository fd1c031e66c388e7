"""Cohere's families."""

from secateur.families.entry import Family, Gguf

FAMILIES = {
    "cohere": Family(gguf=Gguf(("command-r",), epsilon="layer_norm_eps", pairs=True)),
    "cohere2": Family(gguf=Gguf(("cohere2",), epsilon="layer_norm_eps", pairs=True)),
}
