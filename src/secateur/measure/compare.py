"""Evaluate one model, or two side by side: sizes, perplexity of texts, accuracy on tasks, speed."""

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from secateur.base.device import pick_device
from secateur.base.errors import SecateurError
from secateur.base.files import local_path
from secateur.base.memory import parse_memory, rss_bytes
from secateur.base.progress import Silent, Watcher, busy_reading
from secateur.base.quiet import quiet
from secateur.base.words import DTYPES
from secateur.formats.per_layer import model_class
from secateur.measure.perplexity import Perplexity, perplexity
from secateur.measure.speed import Speed, speeds
from secateur.measure.tasks import Kept, TaskResult, kept, open_tasks, zero_shot
from secateur.measure.writing import check_prompts, written
from secateur.model.checkpoint import Checkpoint, open_checkpoint
from secateur.model.facts import positions_of
from secateur.model.tokens import begins_with_bos
from secateur.text.calibration import check_calibration, consecutive_rows
from secateur.text.sources import RANDOM

PROMPT, NEW = 512, 32
"""Tokens read and written when speed is measured, where the model has positions for them."""


@dataclass
class ModelScore:
    """All figures of one model."""

    name: str
    parameters: int
    bytes: int
    """Of the parameters, at the dtype in which the first model is stored."""
    bos: bool
    """Whether rows begin with BOS."""
    texts: dict[str, Perplexity]
    """By source."""
    tasks: list[TaskResult]
    speed: Speed | None = None
    written: dict[str, str] = field(default_factory=dict)
    """What it writes, by prompt."""


class Figure(NamedTuple):
    """One row of the table: a value for each model, and the first one's over the second's."""

    label: str
    values: list[float]
    ratio: float | None
    form: str
    errors: tuple[float | None, ...] = ()
    """Standard errors of the values, where they are known."""
    interval: tuple[float, float] | None = None
    """95 % of the ratio, where it is known."""


@dataclass
class Evaluation:
    """One model, or the model and what it is held against."""

    models: list[ModelScore]
    speed_ratios: tuple[float, float] | None = None
    """Prefill and decoding of the first model over the second's, from runs in turns."""

    def figures(self) -> list[Figure]:
        """What was measured."""
        models, kept = self.models, self.kept()

        def figure(label: str, values: list[float], form: str) -> Figure:
            return Figure(label, values, values[0] / values[1] if len(values) == 2 else None, form)

        figures = [
            figure("parameters", [m.parameters for m in models], "{:,}"),
            figure("bytes at equal dtype", [m.bytes for m in models], "{:,}"),
        ]
        for text in models[0].texts:
            values = [model.texts[text].perplexity for model in models]
            figures.append(figure(f"perplexity {short(text)}", values, "{:,.3f}"))
        for answered in zip(*(m.tasks for m in models), strict=True):
            for metric in answered[0].accuracies():
                accuracies = [task.accuracies()[metric] for task in answered]
                label, values = f"{answered[0].name} {metric}", [accuracy.value for accuracy in accuracies]
                ratio, interval = (part.ratio, part.interval) if (part := kept.get(label)) else (None, None)
                errors = tuple(accuracy.standard_error for accuracy in accuracies)
                figures.append(Figure(label, values, ratio, "{:.3f}", errors, interval))
        speeds = [m.speed for m in models if m.speed is not None]
        if speeds:
            prefill, decode = self.speed_ratios or (None, None)
            figures.append(Figure("prefill tokens/s", [s.prefill for s in speeds], prefill, "{:,.1f}"))
            figures.append(Figure("decoding tokens/s", [s.decode for s in speeds], decode, "{:,.1f}"))
        return figures

    def kept(self) -> dict[str, Kept]:
        """By task and metric, how much of the second model's accuracy the first one keeps; empty for one model."""
        if len(self.models) < 2:
            return {}
        found = {
            f"{first.name} {metric}": kept(accuracy, second.accuracies()[metric])
            for first, second in zip(self.models[0].tasks, self.models[1].tasks, strict=True)
            for metric, accuracy in first.accuracies().items()
        }
        return {label: part for label, part in found.items() if part is not None}

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file; outcomes of a task's items are one string of 0 and 1."""
        result = asdict(self)
        for model in result["models"]:
            for task in model["tasks"]:
                for metric in filter(None, (task["acc"], task["acc_norm"])):
                    metric["outcomes"] = "".join(map(str, metric["outcomes"]))
        return result | {"kept": {label: asdict(part) for label, part in self.kept().items()}}


def short(source: str) -> str:
    """A name for a table: the last part of a path; hub ids and data sets stay as they are."""
    path = local_path(source)
    return path.absolute().name if path.exists() else source


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
    prompts: Sequence[str] = (),
    device: str = "auto",
    memory: str | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    watcher: Watcher | None = None,
) -> Evaluation:
    """Figures of a model, and of another beside it.

    Args:
        model: a folder, a .gguf file or a hub id.
        against: another one, to compare with.
        texts: files or data sets to score.
        length: tokens in a row.
        tokens: from the start of each text; None for all.
        tasks: names of lm-eval's multiple-choice tasks, or of those in `task_path`; scored zero-shot.
        limit: items from the start of each task; None for all.
        task_path: a folder with task files of one's own.
        speed: measure prefill and decoding; two models are measured in turns, so that their ratio holds.
        prompts: behind which each model writes.
        memory: the most that the process may take: `8GB`, or `50%` of what is free; half of it by default.
        dtype: to compute in, on `device`.
        revision: of `model`, where that is a hub id.
        trust_remote_code: let the checkpoints' own code run.

    Raises:
        SecateurError: for anything that cannot be read or measured, before long work.
    """
    watcher = watcher or Silent()
    if dtype not in DTYPES:
        raise SecateurError(f"dtype is '{dtype}'; it must be one of {', '.join(DTYPES)}")
    where = pick_device(device)
    parse_memory(memory)
    check_prompts(prompts)
    for text in texts:
        if text == RANDOM:
            raise SecateurError("random ids cannot be scored; name a text file or a data set")
        check_calibration(text, length=length)
    checkpoints = []
    for name in (model,) if against is None else (model, against):
        with busy_reading(watcher, "Opening", name):
            checkpoints.append(
                open_checkpoint(name, revision=revision if name == model else None, trust_remote_code=trust_remote_code)
            )
    # All texts and tasks are read before a model is loaded: mistakes come first.
    opened = open_tasks(tasks, limit=limit, task_path=task_path, watcher=watcher)
    tokenizers = [checkpoint.tokenizer() if texts or opened or prompts else None for checkpoint in checkpoints]
    rows: list[dict[str, torch.Tensor]] = [{} for _ in checkpoints]
    for checkpoint, tokenizer, found in zip(checkpoints, tokenizers, rows, strict=True):
        for text in texts:
            with busy_reading(watcher, "Reading", text):
                found[text] = scored_rows(checkpoint, tokenizer, text, length, tokens)
    if any(not torch.equal(rows[0][text], rows[-1][text]) for text in texts):
        watcher.note("The two models cut text into different tokens: perplexities, which are per token, do not compare")
    scores: list[ModelScore] = []
    loaded: list[Any] = []
    for checkpoint, tokenizer, found in zip(checkpoints, tokenizers, rows, strict=True):
        name = short(checkpoint.source)
        with watcher.busy(f"Loading {checkpoint.source}"):
            how: dict[str, Any] = {"memory": memory, "whole": speed, "watcher": watcher}
            network = load(checkpoint, getattr(torch, dtype), where, **how)
        scored = {
            text: perplexity(network, found[text], watcher=watcher, what=f"{name} on {short(text)}") for text in texts
        }
        answered = zero_shot(network, tokenizer, opened, watcher=watcher, what=f"{name} on")
        each = watcher.track(prompts, f"{name} writes") if prompts else ()
        wrote = {prompt: written(network, tokenizer, prompt) for prompt in each}
        bos = tokenizer is not None and begins_with_bos(tokenizer)
        count = sum(parameter.numel() for parameter in network.parameters())
        size = count * checkpoints[0].dtype.itemsize
        scores.append(ModelScore(checkpoint.source, count, size, bos, scored, answered, written=wrote))
        # Two models stay in memory only where they are run in turns.
        loaded += [network] if speed else []
        del network
    if not speed:
        return Evaluation(scores)
    with watcher.busy("Measuring speed"):
        return Evaluation(scores, _speeds(loaded, scores))


def load(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    *,
    memory: str | None = None,
    whole: bool = False,
    watcher: Watcher | None = None,
) -> Any:
    """A model through transformers, to be run as it is.

    Where it would take more memory than it may, its layers stay on disk and are read each time they run.

    Args:
        memory: the most that the process may take; see `bytes_of`.
        whole: hold all of it, whatever that takes.

    Raises:
        SecateurError: weights are missing or of another shape; transformers would draw them at random.
    """
    size = sum(info.entries for info in checkpoint.weights.values()) * dtype.itemsize
    apart = not whole and device.type == "cpu" and size > parse_memory(memory) - rss_bytes()
    if apart and checkpoint.quantised:
        raise SecateurError(
            f"{checkpoint.source}: quantised weights are put in memory whole, {size / 1e9:,.2f} GB, for which there is "
            "no room; raise --memory, or evaluate what was pruned of it"
        )
    if apart and watcher is not None:
        watcher.note(f"{checkpoint.source} is read from disk as it runs: whole it takes {size / 1e9:,.2f} GB")
    how: dict[str, Any] = {}
    if apart:
        # For weights that are stored in another form than the model has them in.
        how = {"device_map": {"": "disk"}, "offload_folder": tempfile.mkdtemp(prefix="secateur-")}
    with quiet():
        auto = model_class(checkpoint.config, checkpoint.around)
        network, found = checkpoint.loaded(auto, dtype, output_loading_info=True, ignore_mismatched_sizes=True, **how)
    if found["missing_keys"]:
        raise checkpoint.lacking(sorted(found["missing_keys"]))
    if found["mismatched_keys"]:
        name, stored, wanted = sorted(found["mismatched_keys"])[0]
        raise SecateurError(
            f"{checkpoint.source}: {name} is {list(stored)} where config.json makes it {list(wanted)}; find the "
            "config.json of these weights"
        )
    if apart:
        weakref.finalize(network, shutil.rmtree, how["offload_folder"], ignore_errors=True)
        return network.eval()
    return network.eval().to(device)


def scored_rows(checkpoint: Checkpoint, tokenizer: Any, text: str, length: int, tokens: int | None) -> torch.Tensor:
    """The rows of a text that a model is scored on."""
    return consecutive_rows(
        tokenizer,
        text,
        length=length,
        tokens=tokens,
        vocab_size=checkpoint.config.vocab_size,
        max_positions=checkpoint.max_positions,
    )


def _speeds(networks: list[Any], scores: list[ModelScore]) -> tuple[float, float] | None:
    """Put each model's speed into its scores; two of them also give the first one's ratios to the second."""
    positions = min(positions_of(network.config) or PROMPT + NEW for network in networks)
    new = min(NEW, max(1, positions // 4))
    prompt = min(PROMPT, positions - new)
    for score, found in zip(scores, speeds(networks, prompt=prompt, new=new), strict=True):
        score.speed = found
    first, *others = (score.speed for score in scores)
    return first.over(others[0]) if first and others and others[0] else None
