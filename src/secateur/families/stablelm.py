"""Stability AI's StableLM."""

from secateur.families.entry import Family, Gguf, Stock

FAMILIES = {
    "stablelm": Family(
        stock=Stock(heads="dense", partial="partial_rotary_factor"),
        gguf=Gguf(("stablelm",), epsilon="layer_norm_eps"),
    ),
}
