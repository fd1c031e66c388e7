"""What the paper's variants add to the pipeline."""

from secateur.base.plugins import Plugin
from secateur.paper.options import SIMILARITY, PaperOptions

PLUGIN = Plugin(
    options=PaperOptions,
    helps={
        "criterion": f"{SIMILARITY} (the paper's Algorithm 2): heads that attend like another one; {SIMILARITY}+X: "
        "these first, the rest by X.",
        "recovery": "paper (Algorithms 1, 3 and 4): both layers of a module are fitted to their dense outputs.",
    },
    preselections=(SIMILARITY,),
    recoveries={"paper": "secateur.paper.recovery"},
)
