"""`secateur eval`: one model measured, or two side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from secateur.base.errors import SecateurError
from secateur.base.whole_file import write_whole
from secateur.cli import panels, parameters
from secateur.cli.terminal import Bars, show
from secateur.cli.values import check_new, parse_list


def evaluate(
    model: parameters.Model,
    against: Annotated[
        str | None,
        panels.measured(
            help="A second model, usually the dense one, printed beside with the ratio of MODEL to it.",
            show_default="none",
        ),
    ] = None,
    perplexity: Annotated[
        list[str] | None,
        panels.measured(
            help="Text to score: a .txt or .jsonl file, - for standard input, or a data set (wikitext2, c4, ptb or "
            "name:config:column). May be given several times.",
            show_default="none",
        ),
    ] = None,
    length: Annotated[int, panels.measured(help="Tokens in each row; rows are scored alone.")] = 128,
    tokens: Annotated[int, panels.measured(help="Tokens to use from the start of each text; 0 for all.")] = 8192,
    tasks: Annotated[
        str,
        panels.measured(
            help="Multiple-choice tasks of lm-eval to answer zero-shot, such as boolq,piqa,hellaswag,winogrande,"
            "arc_easy,arc_challenge,openbookqa. Needs secateur\\[tasks]; the data come from the hub.",
            show_default="none",
        ),
    ] = "",
    limit: Annotated[int, panels.measured(help="Items from the start of each task; 0 for all.")] = 0,
    task_path: Annotated[
        Path | None,
        panels.measured(
            help="A folder with task files (.yaml) of your own, in lm-eval's form, which can read local data.",
            show_default="none",
        ),
    ] = None,
    speed: Annotated[
        bool,
        panels.measured(
            "--speed",
            help="Measure tokens/s of prefill and decoding; two models take turns, so that a busy machine does not "
            "spoil their ratio.",
        ),
    ] = False,
    device: parameters.Device = "auto",
    dtype: Annotated[str, panels.computing(help="To compute in: float32, bfloat16 or float16.")] = "float32",
    revision: parameters.Revision = None,
    trust_remote_code: parameters.TrustRemoteCode = False,
    json_: Annotated[
        Path | None, panels.output("--json", help="Also write the figures to this file.", show_default="none")
    ] = None,
    overwrite: Annotated[bool, panels.output("--overwrite", help="Replace figures that are there.")] = False,
) -> None:
    """Measure MODEL: size, perplexity of texts, accuracy on tasks, speed; --against puts another beside it.

    Example: secateur eval ./SmolLM2-pruned --perplexity wiki.txt --against ./SmolLM2-135M --speed
    """
    if tokens < 0:
        raise SecateurError(f"tokens is {tokens}; it must be positive, or 0 for the whole text")
    if limit < 0:
        raise SecateurError(f"limit is {limit}; it must be positive, or 0 for all items")
    if json_ is not None:
        check_new(json_, overwrite)
    bars = Bars()
    with bars.busy("Loading torch and transformers"):
        from secateur.measure.compare import evaluate as run
        from secateur.report.tables import eval_table

    result = run(
        model,
        against=against,
        texts=perplexity or [],
        length=length,
        tokens=tokens or None,
        tasks=list(parse_list(tasks)),
        limit=limit or None,
        task_path=task_path,
        speed=speed,
        device=device,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        watcher=bars,
    )
    if json_ is not None:
        write_whole(json_, json.dumps(result.as_dict(), indent=2) + "\n")
    show(*eval_table(result))
