"""IBM's Bamba: Mamba 2 in the attention's place in most blocks."""

from secateur.families.entry import Family, Stock, TokenMixer

FAMILIES = {
    "bamba": Family(
        feed_forward="feed_forward",
        final_norm="model.final_layernorm",
        token_mixer=TokenMixer("mamba", "out_proj", "linear_attention"),
        returns_tuple=True,
        stock=Stock(partial_rotary_key="partial_rotary_factor"),
    ),
}
