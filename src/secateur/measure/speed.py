"""Speed of a model: tokens per second while it reads a prompt (prefill) and while it generates (decode).

Both speeds come from one greedy generation with the model's own cache. The clock is read after the prompt and after
every new token, so that no time is a difference between two runs. Two models are measured in turns, because a busy
machine slows neighbouring runs equally.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from secateur.base.device import clock
from secateur.base.errors import SecateurError
from secateur.checkpoints.facts import positions_of
from secateur.measure.perplexity import scoring


@dataclass(frozen=True)
class Speed:
    """Tokens per second from the median over repeated runs, with the settings of the measurement."""

    prefill: float
    """Prompt tokens per second of all rows of the batch together; the time includes the first new token."""
    decode: float
    """New tokens per second after the first one, of all rows of the batch together."""
    prompt: int
    """Tokens in the prompt."""
    new: int
    """Number of decode steps."""
    batch: int
    """Rows generated together."""
    prefill_seconds: tuple[float, ...]
    """Time of the whole prompt in each run."""
    decode_seconds: tuple[float, ...]
    """Time of all decode steps in each run."""
    device: str
    dtype: str
    threads: int
    """Number of CPU threads of torch."""

    def over(self, other: "Speed") -> tuple[float, float]:
        """Return the ratios of speed to another model in prefill and decoding: medians over runs in turns."""
        pairs = (
            (self.prefill_seconds, other.prefill_seconds),
            (self.decode_seconds, other.decode_seconds),
        )
        prefill, decode = (median(b / a for a, b in zip(*pair, strict=True)) for pair in pairs)
        return prefill, decode


def speeds(
    models: Sequence[PreTrainedModel], *, prompt: int = 512, new: int = 32, batch: int = 1, repeats: int = 3
) -> list[Speed]:
    """Measure the speed of each model, in turns, so that ratios are right on a busy machine too.

    Args:
        models: Causal language models of transformers that can generate.
        prompt: Tokens in the prompt: random ids, the same in every run.
        new: Number of decode steps.
        batch: Rows generated together.
        repeats: Number of measured runs of each model, after one run that warms up and is not counted.

    Raises:
        SecateurError: A size is below 1, or there are more tokens than a model has positions.
    """
    for name, value in (("prompt", prompt), ("new", new), ("batch", batch), ("repeats", repeats)):
        if value < 1:
            raise SecateurError(f"{name} is {value}, but at least 1 is needed to measure speed")
    for model in models:
        positions = positions_of(model.config)
        # The last token is never fed back, so it needs no position.
        if positions is not None and prompt + new > positions:
            raise SecateurError(
                f"a prompt of {prompt} tokens and {new} new tokens exceed the model's {positions} positions: "
                "measure with a shorter prompt"
            )
    turns = [[_seconds(model, prompt, new, batch) for model in models] for _ in range(repeats + 1)]
    measured = []
    # The first turn only warms up.
    for model, run in zip(models, zip(*turns[1:], strict=True), strict=True):
        prefills, decodes = zip(*run, strict=True)
        speed = Speed(
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
        measured.append(speed)
    return measured


def _seconds(model: PreTrainedModel, prompt: int, new: int, batch: int) -> tuple[float, float]:
    """Return the seconds of the prompt, and of the `new` steps after the first new token."""
    from transformers import GenerationConfig, StoppingCriteriaList

    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(model.device)
    unfinished = torch.zeros(batch, dtype=torch.bool, device=model.device)
    marks: list[float] = []

    def mark(*_: Any, **__: Any) -> torch.Tensor:
        """Record the time; as a stopping criterion, stop no row."""
        marks.append(clock(model.device))
        return unfinished

    before = model.generation_config
    # These settings generate exactly `new` + 1 tokens; the model's own may sample or stop early.
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
