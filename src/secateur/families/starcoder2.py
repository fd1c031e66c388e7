"""BigCode's StarCoder2."""

from secateur.families.entry import Family, Gguf

FAMILIES = {
    "starcoder2": Family(up="c_fc", gate=None, down="c_proj", gguf=Gguf(("starcoder2",), epsilon="norm_epsilon")),
}
