"""EleutherAI's GPT-NeoX and Pythia."""

from secateur.families.entry import Family, Gguf, Stock

FAMILIES = {
    "gpt_neox": Family(
        blocks="gpt_neox.layers",
        attention="attention",
        fused="query_key_value",
        interleaved=True,
        output="dense",
        ungrouped=True,
        up="dense_h_to_4h",
        gate=None,
        down="dense_4h_to_h",
        final_norm="gpt_neox.final_layer_norm",
        stock=Stock(head_counts="dense", theta_key="rotary_emb_base", partial_rotary_key="rotary_pct"),
        gguf=Gguf(("gptneox",), keys={"use_parallel_residual": "use_parallel_residual"}, epsilon="layer_norm_eps"),
    ),
}
