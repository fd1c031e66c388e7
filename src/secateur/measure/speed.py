"""How fast a model reads a prompt (prefill) and writes after it (decode).

Both come from one greedy generation with the model's own cache: a clock that generation asks after each
token marks the end of the prompt and then every step, so no time is the difference of two noisy runs.
Two models are measured in turns, because a busy machine slows neighbouring runs alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

from secateur.base.errors import SecateurError
from secateur.measure.perplexity import scoring
from secateur.model.facts import positions_of


@dataclass(frozen=True)
class Speed:
    """Tokens per second, each from the median of the repeats, and how they were measured."""

    prefill: float
    """Prompt tokens per second, all rows of the batch together; the first new token is included."""
    decode: float
    """New tokens per second behind the first one, all rows of the batch together."""
    prompt: int
    new: int
    """Decode steps."""
    batch: int
    prefill_seconds: tuple[float, ...]
    """One for each repeat, for the whole prompt."""
    decode_seconds: tuple[float, ...]
    """One for each repeat, for all decode steps."""
    device: str
    dtype: str
    threads: int
    """CPU threads of torch."""

    def over(self, other: "Speed") -> tuple[float, float]:
        """How much faster than another model this one reads and writes: medians over the turns that both took."""
        pairs = (
            (self.prefill_seconds, other.prefill_seconds),
            (self.decode_seconds, other.decode_seconds),
        )
        prefill, decode = (median(b / a for a, b in zip(*pair, strict=True)) for pair in pairs)
        return prefill, decode


def speeds(
    models: Sequence[PreTrainedModel], *, prompt: int = 512, new: int = 32, batch: int = 1, repeats: int = 3
) -> list[Speed]:
    """Speed of each model, measured in turns, so that ratios hold on a machine that others use as well.

    Args:
        models: causal language models of transformers that can generate.
        prompt: tokens of the prompt: random ids, the same in every run.
        new: decode steps.
        batch: rows generated together.
        repeats: measured runs of each, after one that warms up and is not counted.

    Raises:
        SecateurError: a size below 1, or more tokens than a model has positions.
    """
    for name, value in (("prompt", prompt), ("new", new), ("batch", batch), ("repeats", repeats)):
        if value < 1:
            raise SecateurError(f"{name} is {value}, but at least 1 is needed to measure speed")
    for model in models:
        positions = positions_of(model.config)
        # The last token is never fed back, so it needs no position.
        if positions is not None and prompt + new > positions:
            raise SecateurError(
                f"a prompt of {prompt} and {new} new tokens exceed the model's {positions} positions: "
                "measure with a shorter prompt"
            )
    turns = [[_seconds(model, prompt, new, batch) for model in models] for _ in range(repeats + 1)]
    found = []
    # The first turn has warmed up.
    for model, run in zip(models, zip(*turns[1:], strict=True), strict=True):
        prefills, decodes = zip(*run, strict=True)
        one = Speed(
            prefill=batch * prompt / median(prefills),
            decode=batch * new / median(decodes),
            prompt=prompt,
            new=new,
            batch=batch,
            prefill_seconds=prefills,
            decode_seconds=decodes,
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
        )
        found.append(one)
    return found


def _seconds(model: PreTrainedModel, prompt: int, new: int, batch: int) -> tuple[float, float]:
    """Seconds for the prompt and for the `new` steps behind the first token."""
    from transformers import GenerationConfig, StoppingCriteriaList

    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(model.device)
    goes_on = torch.zeros(batch, dtype=torch.bool, device=model.device)
    marks: list[float] = []

    def mark(*_: Any, **__: Any) -> torch.Tensor:
        """Note the time, and as a stopping criterion let generation go on."""
        if model.device.type != "cpu":
            torch.accelerator.synchronize(model.device)
        marks.append(perf_counter())
        return goes_on

    before = model.generation_config
    # Exactly `new` more tokens: the model's own settings may sample or stop early.
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=new + 1, use_cache=True, pad_token_id=0)
    try:
        with scoring(model):
            mark()
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                stopping_criteria=StoppingCriteriaList([mark]),
            )
    finally:
        model.generation_config = before
    start, first, *_, last = marks
    return first - start, last - first
