"""Arguments and options that several commands take, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import panels

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A Hugging Face folder, a hub id (owner/name), or a .gguf file.", show_default=False
    ),
]
PrunedFolder = Annotated[
    Path, typer.Argument(metavar="DIR", help="A folder that secateur prune wrote.", show_default=False)
]
Sparsity = Annotated[
    float | None, panels.target(help="Share of the parameters to remove, between 0 and 1.", show_default="0.25")
]
Target = Annotated[
    str | None,
    panels.target(
        help="In place of a share, the most that the result may take: params=100M, params=80%, bytes=60MB (of "
        "its tensors), kv=50%, prefill=1.5x or decode=1.5x (as fast, on this machine), ppl=1.2x (of prune "
        "alone: the smallest model within that loss).",
        show_default="none",
    ),
]
Of = Annotated[str, panels.target(help="What that share counts: the pruned blocks, or the whole model.")]
Blocks = Annotated[
    str | None,
    panels.target(help="Blocks to prune, first:end with the end left out, such as 4:30.", show_default="all"),
]
Modules = Annotated[str, panels.target(help="What may go: heads, channels, or both.")]
Widths = Annotated[
    str,
    panels.target(
        help="adaptive (AL-AM): each module the width at which the whole model loses least; uniform: one width for all "
        "blocks, which the stock class holds, its split between heads and channels the one that costs least; or by "
        "hand (ML-MM) a JSON file with the share that goes for ranges of blocks, like "
        '{"4:20": 0.2, "20:30": {"heads": 0, "channels": 0.4}}; {"0:32": 0.25} is UL-UM, one ratio everywhere.'
    ),
]
Round = Annotated[
    int,
    panels.target(
        "--round",
        help="Feed-forward widths that are cut become multiples of this, for fast kernels: 32 on CPUs, 64 or "
        "128 on GPUs.",
    ),
]
Criterion = Annotated[
    str,
    panels.method(
        help="Which units go. surgeon: those that the others replace best, the most accurate once the rest is "
        "refitted; second-moment (the paper's), wanda (Wanda-sp), flap-wifv, flap-ifv, flap-wifn: by activations; "
        "llm-pruner-vector, llm-pruner-element1, llm-pruner-element2: by gradients; l1, l2: by weights alone; random; "
        "similarity (the paper's Algorithm 2): heads that attend like another one; similarity+X: these "
        "first, the rest by X; or a pair, heads=X,channels=Y."
    ),
]
Tau = Annotated[
    str | None,
    panels.method(
        help="With similarity: heads whose attention differs by less are similar, in nats of Jensen-Shannon divergence "
        "(0.19, say); auto: the threshold at which the share --sparsity of the attention goes.",
        show_default="none",
    ),
]
Sigma = Annotated[
    str | None,
    panels.method(
        help="What second-moment takes for the covariance of a module's inputs: data, that of the calibration; "
        "identity; or random, that of random token ids.",
        show_default="data",
    ),
]
Ridge = Annotated[
    float,
    panels.method(help="Pull of the refit toward the old weights; less follows the calibration text more closely."),
]
Level1 = Annotated[
    int,
    panels.method(
        help="Of the refit: steps by which the up and gate layers are fitted along with the output layer; 0 "
        "leaves them as they are, in a quarter to two thirds of the time, by machine."
    ),
]
Calibration = Annotated[
    str,
    panels.calibration(
        help="Text that shows what the model does: a .txt file, a .jsonl file with the key text or messages, "
        "- for standard input, a data set (wikitext2, c4, ptb, bookcorpus or name:config:column), or without any data: "
        "self, what the model itself writes, or random token ids."
    ),
]
Samples = Annotated[int, panels.calibration(help="Rows drawn from it at random.")]
Fits = Annotated[
    int,
    panels.calibration(
        help="So many refits are averaged, each to the rows and to others beside them: 1 takes six tenths of the time "
        "of 2, more than 2 bring little; 0 is one refit to the rows alone."
    ),
]
More = Annotated[
    str,
    panels.calibration(
        help="What these others are: rewritten, the rows with half of their tokens written anew; or self, what the "
        "model writes from nothing, whole in memory, which keeps more of the kinds of text that the calibration lacks."
    ),
]
Length = Annotated[int, panels.calibration(help="Tokens in each row.")]
Temperature = Annotated[
    float,
    panels.calibration(help="At which the model writes, wherever the source of rows is self."),
]
SaveCalibration = Annotated[
    Path | None,
    panels.calibration(
        help="Keep what the model writes to calibrate on in this new .jsonl file; --calibration FILE reads the same "
        "rows back.",
        show_default="none",
    ),
]
Seed = Annotated[int, panels.calibration(help="Decides the rows, and the criterion random.")]
Device = Annotated[
    str, panels.computing(help="Where to compute: auto (CUDA if there is any, else the CPU), cpu, cuda, cuda:1.")
]
Revision = Annotated[
    str | None,
    panels.computing(help="Branch, tag or commit of MODEL, where that is a hub id.", show_default="the main branch"),
]
TrustRemoteCode = Annotated[
    bool,
    panels.computing(
        "--trust-remote-code",
        help="Let code that comes with the checkpoint run, where transformers does not know the model.",
    ),
]
Dtype = Annotated[
    str | None,
    panels.output(
        help="Of the weights written: float32, bfloat16 or float16.", show_default="as in MODEL; bfloat16 from .gguf"
    ),
]
Type = Annotated[str, panels.output("--type", help="Of the tensors in a GGUF file: f32, f16, bf16, q8_0, q4_0.")]
Survey = Annotated[
    Path | None,
    panels.output(
        help="Keep the survey in this file: read if it is there, written otherwise. One survey serves every size.",
        show_default="none",
    ),
]
Format = Annotated[
    str | None,
    panels.output(
        help="hf: a width for each block, transformers loads it with trust_remote_code=True; stock: one width, the "
        "family's own class; gguf: one file for llama.cpp.",
        show_default="hf; stock with --widths uniform",
    ),
]
