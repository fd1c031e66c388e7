"""`secateur eval`: measure one model, or two side by side."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from secateur.base.errors import SecateurError
from secateur.cli.bars import Bars
from secateur.cli.generate import WHAT_TO_MEASURE, Model, Only, ScoredTokens, expand_options
from secateur.cli.terminal import print_result
from secateur.steps.options import COMPUTING, OUTPUT, RunOptions

_measured = partial(typer.Option, rich_help_panel=WHAT_TO_MEASURE)


@expand_options
def evaluate(
    model: Model,
    run_options: Annotated[RunOptions, Only(("device", "memory", "revision", "trust_remote_code"))],
    against: Annotated[
        str | None,
        _measured(
            help="A second model to measure, usually the one before pruning. The table also shows ratios: the value of "
            "MODEL divided by the value of the second model.",
            show_default="none",
        ),
    ] = None,
    perplexity: Annotated[
        list[str] | None,
        _measured(
            help="Measure the perplexity of this text: a .txt or .jsonl file, - for standard input, or a data set "
            "(wikitext2, c4, ptb or name:config:column). May be given several times.",
            show_default="none",
        ),
    ] = None,
    length: Annotated[int, _measured(help="Tokens in each row; each row is scored on its own.")] = 128,
    tokens: ScoredTokens = 8192,
    tasks: Annotated[
        str,
        _measured(
            help="Measure the zero-shot accuracy on these multiple-choice tasks of lm-eval, separated by commas, such "
            "as boolq,piqa,hellaswag,winogrande. Needs secateur\\[tasks]; the data is downloaded from the Hugging Face "
            "Hub.",
            show_default="none",
        ),
    ] = "",
    limit: Annotated[
        int, _measured(help="Number of items to score, from the start of each task; 0 for all.", min=0)
    ] = 0,
    task_path: Annotated[
        Path | None,
        _measured(
            help="Folder with your own task files (.yaml) in lm-eval's format, which can read local data.",
            show_default="none",
        ),
    ] = None,
    speed: Annotated[
        bool,
        _measured(
            "--speed",
            help="Measure the speed of prefill and decoding in tokens per second. Two models are measured in turns, so "
            "that a busy machine slows both.",
        ),
    ] = False,
    answers: Annotated[
        bool | None,
        _measured(
            "--answers/--no-answers",
            help="Let each model answer 40 prompts that come with the package. Prints the share of answers that loop "
            "and, with --against, the agreement: the share of the second model's answer tokens that MODEL ranks first.",
            show_default="with --against",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        _measured(
            help="Print up to 80 tokens that each model writes after this text; a chat model answers it. May be given "
            "several times.",
            show_default="none",
        ),
    ] = None,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Write README.md and report.html in MODEL, a folder written by secateur prune, again with these "
            "results. Needs --against with the model that MODEL was pruned from.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="Data type to compute in: float32, bfloat16 or float16.", rich_help_panel=COMPUTING)
    ] = "float32",
) -> None:
    """Measure size, perplexity, answers, accuracy on tasks and speed of MODEL, alone or next to a second model.

    Example: secateur eval ./SmolLM2-pruned --perplexity wiki.txt --against ./SmolLM2-135M --speed
    """
    bars = Bars()
    with bars.loading():
        from secateur.measure.evaluation import evaluate as run
        from secateur.report.folder import add_measurements, check_base, check_record
        from secateur.report.tables import eval_table, measured_rows, measurement_notes

    if report:
        if against is None:
            raise SecateurError("--report needs --against: add --against with the model that MODEL was pruned from")
        check_record(Path(model))
        check_base(Path(model), against, trust_remote_code=run_options.trust_remote_code)
    result = run(
        model,
        against=against,
        texts=perplexity or [],
        length=length,
        tokens=tokens or None,
        tasks=[name for part in tasks.split(",") if (name := part.strip())],
        limit=limit or None,
        task_path=task_path,
        speed=speed,
        answers=against is not None if answers is None else answers,
        prompts=prompt or [],
        device=run_options.device,
        memory=run_options.memory,
        dtype=dtype,
        revision=run_options.revision,
        trust_remote_code=run_options.trust_remote_code,
        watcher=bars,
    )
    if report:
        here, base = result.models
        texts = [(asked, wrote, base.written[asked]) for asked, wrote in here.written.items()]
        notes = measurement_notes(result, ("this model", "the model before pruning"))
        add_measurements(Path(model), measured_rows(result), texts, notes)
    print_result(result, *eval_table(result))
