"""Families with a token mixer (Mamba or convolutions) in the attention's place in most blocks."""

from dataclasses import replace

from secateur.families.entry import Entry, Gguf, GgufInput, Stock, Vllm

LFM2_GGUF = Gguf(
    ("lfm2",),
    keys={"shortconv.l_cache": "conv_L_cache"},
    activation="silu",
    epsilon="norm_eps",
    token_mixers="conv",
)

FAMILIES = {
    # IBM's Bamba: Mamba 2 in the attention's place in most blocks.
    "bamba": Entry(stock=Stock(partial_rotary_key="partial_rotary_factor")),
    # Liquid's LFM2 families: convolutions in the attention's place in most blocks.
    "lfm2": Entry(
        {"derives_channels": False},
        stock=Stock(channels_aliases=("block_ff_dim",), fixed_values=(("block_auto_adjust_ff_dim", False),)),
        gguf=LFM2_GGUF,
        vllm=Vllm(instead_of_fewer_heads="prune channels only"),
    ),
    "lfm2_moe": Entry(
        gguf=replace(LFM2_GGUF, architectures=("lfm2moe",), gating="sigmoid", input=GgufInput()),
        vllm=Vllm(instead_of_fewer_heads="prune experts and channels only"),
    ),
}
