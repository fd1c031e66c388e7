"""Plugin that adds the variants of the paper to the pipeline."""

from secateur.base.plugins import Plugin
from secateur.paper.options import SIMILARITY, PaperOptions

PLUGIN = Plugin(
    options=PaperOptions,
    helps={
        "criterion": f"{SIMILARITY} (Algorithm 2 of the paper; not in secateur survey): heads with nearly the same "
        f"attention weights as another head; {SIMILARITY}+X: such heads first, then units by X.",
        "recovery": "paper (Algorithms 1, 3 and 4 of the paper): fit the input projections and the output projection "
        "of each module to their outputs in the original model.",
    },
    preselections=(SIMILARITY,),
    recoveries={"paper": "secateur.paper.recovery"},
)
