"""Figures of one evaluated model, or of two side by side."""

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from secateur.base.files import local_path
from secateur.measure.answers import AnswerScore
from secateur.measure.perplexity import Perplexity
from secateur.measure.speed import Speed
from secateur.measure.tasks import Accuracy, AccuracyRatio, TaskResult, accuracy_ratio


@dataclass
class ModelScore:
    """All figures of one model."""

    name: str
    parameters: int
    """Number of parameters."""
    bytes: int
    """Size of the parameters in bytes if all were stored in `dtype`."""
    dtype: str
    """Dtype in which the first model is stored; of a quantised model, the dtype in which it is read."""
    stored_bytes: int
    """Number of bytes of the tensors in the folder or file."""
    begins_with_bos: bool
    """Whether rows begin with BOS."""
    texts: dict[str, Perplexity]
    """Perplexity by source of text."""
    tasks: list[TaskResult]
    speed: Speed | None = None
    answers: AnswerScore | None = None
    """Figures of the answers to the prompts of the package; None where they are not measured."""
    chat_template: bool = False
    """Whether prompts are put into the tokenizer's chat template."""
    written: dict[str, str] = field(default_factory=dict)
    """Generated text by prompt."""


class Figure(NamedTuple):
    """Row of the table: a value for each model, and their ratio."""

    label: str
    values: list[float]
    ratio: float | None
    """The first model's value over the second's; None for one model, and where the second's is 0."""
    form: str
    """Format string of a value."""
    errors: tuple[float | None, ...] = ()
    """Standard errors of the values, where they are known."""
    interval: tuple[float, float] | None = None
    """95 % confidence interval of the ratio, where it is known."""

    @classmethod
    def of(cls, label: str, values: list[float], form: str) -> "Figure":
        """Return a figure whose ratio is the first value over the second, unless that is 0."""
        return cls(label, values, values[0] / values[1] if len(values) == 2 and values[1] else None, form)


@dataclass
class Evaluation:
    """Result of an evaluation: one model, or a model and the one that it is compared with."""

    models: list[ModelScore]
    speed_ratios: tuple[float, float] | None = None
    """Ratios of the first model's speed to the second's in prefill and decoding, from runs in turns."""

    def figures(self) -> list[Figure]:
        """Return all figures, in the order of the table."""
        models = self.models
        figures = [
            Figure.of("parameters", [model.parameters for model in models], "{:,}"),
            Figure.of(f"bytes in {models[0].dtype}", [model.bytes for model in models], "{:,}"),
        ]
        if any(model.name.endswith(".gguf") for model in models):
            bits = [8 * model.stored_bytes / model.parameters for model in models]
            figures.append(Figure.of("bytes as stored", [model.stored_bytes for model in models], "{:,}"))
            figures.append(Figure.of("bits per weight", bits, "{:.2f}"))
        for text in models[0].texts:
            perplexities, name = [model.texts[text].perplexity for model in models], self.name_of(text)
            figures.append(Figure.of(f"perplexity {name}", perplexities, "{:,.3f}"))
            bits = [score for model in models if (score := model.texts[text].bits_per_byte) is not None]
            figures += [Figure.of(f"bits per byte {name}", bits, "{:.4f}")] if len(bits) == len(models) else []
        return [*figures, *self._answers(), *self._accuracies(), *self._speeds()]

    def name_of(self, text: str) -> str:
        """Return the short name of a text; its whole name if another text has the same short name."""
        names = [short(other) for other in self.models[0].texts]
        return short(text) if names.count(short(text)) == 1 else text

    def _answers(self) -> list[Figure]:
        scores = [model.answers for model in self.models if model.answers is not None]
        if len(scores) < len(self.models):
            return []
        figures = [Figure.of("answers that loop", [score.loops for score in scores], "{:.1%}")]
        if (agreement := scores[0].agreement) is not None:
            figures.insert(0, Figure.of("agreement", [agreement, 1.0], "{:.1%}"))
        return figures

    def _accuracies(self) -> list[Figure]:
        figures, ratios = [], self.accuracy_ratios()
        for label, accuracies in self._by_task().items():
            ratio, interval = (found.ratio, found.interval) if (found := ratios.get(label)) else (None, None)
            errors = tuple(accuracy.standard_error for accuracy in accuracies)
            values = [accuracy.value for accuracy in accuracies]
            figures.append(Figure(label, values, ratio, "{:.3f}", errors, interval))
        return figures

    def _by_task(self) -> dict[str, list[Accuracy]]:
        """Return the accuracy of each model, by task and metric."""
        return {
            f"{results[0].name} {metric}": [result.accuracies()[metric] for result in results]
            for results in zip(*(model.tasks for model in self.models), strict=True)
            for metric in results[0].accuracies()
        }

    def _speeds(self) -> list[Figure]:
        speeds = [model.speed for model in self.models if model.speed is not None]
        if not speeds:
            return []
        prefill, decode = self.speed_ratios or (None, None)
        return [
            Figure("prefill tokens/s", [speed.prefill for speed in speeds], prefill, "{:,.1f}"),
            Figure("decoding tokens/s", [speed.decode for speed in speeds], decode, "{:,.1f}"),
        ]

    def accuracy_ratios(self) -> dict[str, AccuracyRatio]:
        """Return the first model's accuracies over the second's, by task and metric; empty for one model."""
        if len(self.models) < 2:
            return {}
        ratios = {label: accuracy_ratio(*accuracies) for label, accuracies in self._by_task().items()}
        return {label: ratio for label, ratio in ratios.items() if ratio is not None}

    def as_dict(self) -> dict[str, Any]:
        """Return the contents of a JSON file; the outcomes of a task's items are one string of 0 and 1."""
        result = asdict(self)
        for model in result["models"]:
            for task in model["tasks"]:
                for metric in filter(None, (task["acc"], task["acc_norm"])):
                    metric["outcomes"] = "".join(map(str, metric["outcomes"]))
        return result | {"accuracy_ratios": {label: asdict(ratio) for label, ratio in self.accuracy_ratios().items()}}


def short(source: str) -> str:
    """Return the name of a source for a table: the last part of a path; hub ids and data sets stay as they are."""
    path = local_path(source)
    return path.absolute().name if path.exists() else source
