"""Adept's Persimmon."""

from secateur.families.entry import Family, Stock

FAMILIES = {
    "persimmon": Family(
        fused="query_key_value",
        interleaved=True,
        output="dense",
        ungrouped=True,
        up="dense_h_to_4h",
        gate=None,
        down="dense_4h_to_h",
        final_norm="model.final_layernorm",
        stock=Stock(head_counts="dense", partial_rotary_key="partial_rotary_factor"),
    ),
}
