"""Salesforce's CodeGen."""

from secateur.families.entry import Family, Stock

FAMILIES = {
    "codegen": Family(
        blocks="transformer.h",
        attention="attn",
        fused="qkv_proj",
        output="out_proj",
        ungrouped=True,
        up="fc_in",
        gate=None,
        down="fc_out",
        final_norm="transformer.ln_f",
        heads_locked="its fused query, key and value layer is stored in four parts, each with a quarter of the heads",
        stock=Stock(channels_key="n_inner", head_counts="dense", theta_key=None),
    ),
}
