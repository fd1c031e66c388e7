"""Stability AI's StableLM."""

from secateur.families.entry import Family, Gguf, Stock

FAMILIES = {
    "stablelm": Family(
        heads_locked="its query and key norms differ from head to head",
        locked_if="qk_layernorm",
        stock=Stock(head_counts="dense", partial_rotary_key="partial_rotary_factor"),
        gguf=Gguf(("stablelm",), epsilon="layer_norm_eps"),
    ),
}
