"""EleutherAI's GPT-J. llama.cpp has no graph of it."""

from secateur.families.entry import Family, Stock

FAMILIES = {
    "gptj": Family(
        blocks="transformer.h",
        attention="attn",
        output="out_proj",
        ungrouped=True,
        up="fc_in",
        gate=None,
        down="fc_out",
        final_norm="transformer.ln_f",
        stock=Stock(channels_key="n_inner", head_counts="dense", theta_key=None),
    ),
}
