"""Evaluation of one model, or of two side by side: size, perplexity of texts, answers, accuracy on tasks, speed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from secateur.base.device import pick_device
from secateur.base.errors import SecateurError
from secateur.base.memory import parse_memory
from secateur.base.progress import Silent, Watcher, busy_reading
from secateur.base.words import DTYPES
from secateur.checkpoints.facts import positions_of
from secateur.checkpoints.tokens import begins_with_bos
from secateur.measure.answers import AnswerTest
from secateur.measure.figures import Evaluation, ModelScore, short
from secateur.measure.generation import generate
from secateur.measure.loading import Model, load, open_to_measure, stored_bytes
from secateur.measure.perplexity import perplexity
from secateur.measure.speed import speeds
from secateur.measure.tasks import OpenTask, open_tasks, zero_shot
from secateur.text import calibration
from secateur.text.calibration import ScoredRows, check_calibration
from secateur.text.documents import has_chat_template
from secateur.text.sources import RANDOM

PROMPT_TOKENS, NEW_TOKENS = 512, 32
"""Number of tokens read and generated when speed is measured, if the model has enough positions."""


class _Opened(NamedTuple):
    """A model that is opened but not loaded, with the rows to score it on."""

    model: Model
    tokenizer: Any
    rows: dict[str, ScoredRows]
    """Rows by source of text."""


def evaluate(
    model: str,
    *,
    against: str | None = None,
    texts: list[str],
    length: int = 128,
    tokens: int | None = 8192,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    task_path: str | Path | None = None,
    speed: bool = False,
    answers: bool = False,
    prompts: Sequence[str] = (),
    device: str = "auto",
    memory: str | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    watcher: Watcher | None = None,
) -> Evaluation:
    """Evaluate a model, alone or together with another one.

    Args:
        model: A folder, a .gguf file or a hub id.
        against: A second model to compare with.
        texts: Files or data sets whose perplexity is measured.
        length: Tokens in a row.
        tokens: Number of tokens from the start of each text; None for all.
        tasks: Names of lm-eval's multiple-choice tasks, or of tasks in `task_path`; scored zero-shot.
        limit: Number of items from the start of each task; None for all.
        task_path: A folder with the user's own task files.
        speed: Whether to measure prefill and decoding. Two models are measured in turns, so that their ratio is fair.
        answers: Whether each model answers the prompts of the package, for its agreement with the second model and the
            share of answers that loop. They are left out, with a note, for a model that does not fit into memory.
        prompts: Texts after which each model generates text.
        device: Device to compute on.
        memory: Limit on the memory of the process: `8GB`, or `50%` of the free memory; by default half of the free
            memory.
        dtype: Dtype to compute in.
        revision: Revision of `model` on the hub.
        trust_remote_code: Whether code that ships with the checkpoints may run.
        watcher: Progress output.

    Raises:
        SecateurError: Something cannot be read or measured. Most such errors are found before any model is loaded.
    """
    watcher = watcher or Silent()
    if dtype not in DTYPES:
        raise SecateurError(f"dtype is '{dtype}'; it must be one of {', '.join(DTYPES)}")
    where = pick_device(device)
    parse_memory(memory)
    if any(not prompt.strip() for prompt in prompts):
        raise SecateurError("a prompt is empty; give some words for the models to continue")
    for text in texts:
        if text == RANDOM:
            raise SecateurError("random token ids cannot be scored; name a text file or a data set")
        check_calibration(text, length=length)
    models = []
    for name in (model,) if against is None else (model, against):
        with busy_reading(watcher, "Opening", name):
            named = revision if name == model else None
            models.append(open_to_measure(name, revision=named, trust_remote_code=trust_remote_code))
    # All texts and tasks are read before a model is loaded, so that mistakes are found first.
    opened_tasks = open_tasks(tasks, limit=limit, task_path=task_path, watcher=watcher)
    needs_tokenizer = bool(texts or opened_tasks or prompts)
    opened = [
        _open(one, needs_tokenizer or (answers and one.has_tokenizer), texts, length, tokens, watcher) for one in models
    ]
    if any(not torch.equal(opened[0].rows[text].ids, opened[-1].rows[text].ids) for text in texts):
        watcher.note(
            "The two models tokenise texts differently: their perplexities are per token, so they cannot be compared; "
            "their bits per byte can"
        )
    test = AnswerTest(watcher) if answers else None
    scores: list[ModelScore] = []
    networks: list[Any] = []
    # The second model comes first, as its answers run through the other one.
    for one in reversed(opened):
        with watcher.busy(f"Loading {one.model.source}"):
            network = load(one.model, getattr(torch, dtype), where, memory=memory, whole=speed, watcher=watcher)
        scores.insert(0, _score(one, network, opened_tasks, test, prompts, models[0].dtype, watcher))
        # Both models stay in memory only if they are run in turns.
        networks[:0] = [network] if speed else []
        del network
    if not speed:
        return Evaluation(scores)
    with watcher.busy("Measuring speed"):
        return Evaluation(scores, _measure_speeds(networks, scores))


def _open(
    model: Model, needs_tokenizer: bool, texts: Sequence[str], length: int, tokens: int | None, watcher: Watcher
) -> _Opened:
    """Read the tokenizer and the texts of a model."""
    tokenizer, rows = model.tokenizer() if needs_tokenizer else None, {}
    for text in texts:
        with busy_reading(watcher, "Reading", text):
            rows[text] = scored_rows(model, tokenizer, text, length, tokens)
    return _Opened(model, tokenizer, rows)


def _score(
    opened: _Opened,
    network: Any,
    tasks: Sequence[OpenTask],
    test: AnswerTest | None,
    prompts: Sequence[str],
    stored_dtype: torch.dtype,
    watcher: Watcher,
) -> ModelScore:
    """Measure all figures of a model but its speed."""
    model, tokenizer, rows = opened
    name = short(model.source)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    texts = {
        text: perplexity(network, scored.ids, text_bytes=scored.bytes, watcher=watcher, what=f"{name} on {short(text)}")
        for text, scored in rows.items()
    }
    results = zero_shot(network, tokenizer, tasks, watcher=watcher, what=f"{name} on")
    tracked = watcher.track(prompts, f"{name} writes") if prompts else ()
    return ModelScore(
        model.source,
        parameters,
        parameters * stored_dtype.itemsize,
        str(stored_dtype).removeprefix("torch."),
        stored_bytes(model),
        begins_with_bos=tokenizer is not None and begins_with_bos(tokenizer),
        texts=texts,
        tasks=results,
        answers=None if test is None else test.score(network, tokenizer, name),
        chat_template=has_chat_template(tokenizer),
        written={prompt: generate(network, tokenizer, prompt) for prompt in tracked},
    )


def scored_rows(model: Model, tokenizer: Any, text: str, length: int, tokens: int | None) -> ScoredRows:
    """Return the rows of a text on which a model is scored."""
    return calibration.consecutive_rows(
        tokenizer,
        text,
        length=length,
        tokens=tokens,
        vocab_size=model.config.vocab_size,
        max_positions=model.max_positions,
    )


def _measure_speeds(networks: list[Any], scores: list[ModelScore]) -> tuple[float, float] | None:
    """Put the speed of each model into its scores, and return the ratios of the first model to the second, if any."""
    positions = min(positions_of(network.config) or PROMPT_TOKENS + NEW_TOKENS for network in networks)
    new = min(NEW_TOKENS, max(1, positions // 4))
    prompt = min(PROMPT_TOKENS, positions - new)
    measured = speeds(networks, prompt=prompt, new=new)
    for score, speed in zip(scores, measured, strict=True):
        score.speed = speed
    return measured[0].over(measured[1]) if len(measured) == 2 else None
