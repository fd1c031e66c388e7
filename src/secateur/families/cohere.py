"""Cohere's families."""

from secateur.families.entry import Family, Gguf

FAMILIES = {
    "cohere": Family(
        heads_locked="its query and key norms differ from head to head",
        locked_if="use_qk_norm",
        gguf=Gguf(("command-r",), keys={"logit_scale": "logit_scale"}, epsilon="layer_norm_eps", interleaved_rope=True),
    ),
    "cohere2": Family(
        gguf=Gguf(("cohere2",), keys={"logit_scale": "logit_scale"}, epsilon="layer_norm_eps", interleaved_rope=True)
    ),
}
