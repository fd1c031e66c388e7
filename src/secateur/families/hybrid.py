"""Families with a token mixer (Mamba or convolutions) in the attention's place in most blocks."""

from dataclasses import replace

from secateur.families.entry import Experts, Family, Gguf, GgufInput, Stock, TokenMixer, Vllm
from secateur.families.mistral import W1_W2_W3

LFM2 = Family(
    output="out_proj",
    feed_forward="feed_forward",
    up="w3",
    gate="w1",
    down="w2",
    final_norm="model.embedding_norm",
    token_mixer=TokenMixer("conv", "out_proj", "conv"),
    stock=Stock(channels_aliases=("block_ff_dim",), fixed_values=(("block_auto_adjust_ff_dim", False),)),
    gguf=Gguf(("lfm2",), keys={"shortconv.l_cache": "conv_L_cache"}, activation="silu", epsilon="norm_eps"),
    vllm=Vllm(instead_of_fewer_heads="prune channels only"),
)


FAMILIES = {
    # IBM's Bamba: Mamba 2 in the attention's place in most blocks.
    "bamba": Family(
        feed_forward="feed_forward",
        final_norm="model.final_layernorm",
        token_mixer=TokenMixer("mamba", "out_proj", "linear_attention"),
        returns_tuple=True,
        stock=Stock(partial_rotary_key="partial_rotary_factor"),
    ),
    # Liquid's LFM2 families: convolutions in the attention's place in most blocks.
    "lfm2": LFM2,
    "lfm2_moe": replace(
        LFM2,
        experts=Experts(router_bias="expert_bias", stored=W1_W2_W3),
        stock=Stock(),
        gguf=replace(
            LFM2.gguf,
            architectures=("lfm2moe",),
            input=GgufInput(),
        ),
        vllm=Vllm(instead_of_fewer_heads="prune experts and channels only"),
    ),
}
