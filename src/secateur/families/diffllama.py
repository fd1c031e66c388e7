"""DiffLlama: Llama with differential attention."""

from secateur.families.entry import Family, Stock

FAMILIES = {
    "diffllama": Family(
        heads_locked="its heads come in pairs, one from each half, and share a norm",
        stock=Stock(head_counts="dense"),
    ),
}
