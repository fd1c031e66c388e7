"""MosaicML's MPT."""

from secateur.families.bloom import ALIBI
from secateur.families.entry import Family, Gguf, Stock

FAMILIES = {
    "mpt": Family(
        blocks="transformer.blocks",
        attention="attn",
        fused="Wqkv",
        output="out_proj",
        ungrouped=True,
        feed_forward=None,
        up="ffn.up_proj",
        gate=None,
        down="ffn.down_proj",
        activation="ffn.act",
        final_norm="transformer.norm_f",
        heads_locked=ALIBI,
        returns_tuple=True,
        stock=Stock(channels_key="ffn_dim", derives_channels=True, head_counts="dense", theta_key=None),
        gguf=Gguf(("mpt",), activation="gelu", epsilon="layer_norm_epsilon"),
    ),
}
