"""Meta's OPT. llama.cpp has no graph of it."""

from secateur.families.entry import Family, Stock

FAMILIES = {
    "opt": Family(
        blocks="model.decoder.layers",
        output="out_proj",
        ungrouped=True,
        feed_forward=None,
        up="fc1",
        gate=None,
        down="fc2",
        final_norm="model.decoder.final_layer_norm",
        pre_norm="do_layer_norm_before",
        stock=Stock(channels_key="ffn_dim", head_counts="dense", theta_key=None),
    ),
}
