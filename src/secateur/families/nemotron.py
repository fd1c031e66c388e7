"""NVIDIA's Nemotron."""

from secateur.families.entry import Family, Gguf, Stock

FAMILIES = {
    "nemotron": Family(
        gate=None,
        norm_offset=True,
        stock=Stock(partial_rotary_key="partial_rotary_factor"),
        gguf=Gguf(("nemotron",), epsilon="norm_eps"),
    ),
}
