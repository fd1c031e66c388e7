"""Z.ai's GLM families and LG's EXAONE families, whose experts are DeepSeek's."""

from secateur.families.deepseek import DEEPSEEK2
from secateur.families.entry import Entry, Gguf, GgufInput, Stock

PARTIAL = Stock(partial_rotary_key="partial_rotary_factor")
WINDOW = {"attention.sliding_window": "sliding_window"}

FAMILIES = {
    "glm": Entry(stock=PARTIAL, gguf=Gguf(("chatglm",), interleaved_rope=True)),
    "glm4": Entry(stock=PARTIAL, gguf=Gguf(("glm4",), interleaved_rope=True)),
    "glm4_moe": Entry(stock=PARTIAL, gguf=Gguf(("glm4moe",), gating="sigmoid", input=GgufInput())),
    "glm4_moe_lite": Entry(stock=PARTIAL, gguf=DEEPSEEK2),
    "exaone4": Entry(gguf=Gguf(("exaone4",))),
    "exaone_moe": Entry(
        gguf=Gguf(
            ("exaone-moe",),
            keys=WINDOW,
            gating="sigmoid",
            input=GgufInput(renamed=(("gate.e_score_correction", "e_score_correction"),)),
        )
    ),
}
