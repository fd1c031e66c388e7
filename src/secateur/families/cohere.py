"""Cohere's families."""

from secateur.families.entry import Family, Gguf

FAMILIES = {
    "cohere": Family(
        gguf=Gguf(("command-r",), keys={"logit_scale": "logit_scale"}, epsilon="layer_norm_eps", interleaved_rope=True)
    ),
    "cohere2": Family(
        gguf=Gguf(("cohere2",), keys={"logit_scale": "logit_scale"}, epsilon="layer_norm_eps", interleaved_rope=True)
    ),
}
