"""Text that a model generates after prompts: always the likeliest token (greedy)."""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from secateur.base.errors import SecateurError
from secateur.base.quiet import quiet
from secateur.checkpoints.facts import positions_of
from secateur.checkpoints.tokens import encode, encode_start, rendered
from secateur.measure.perplexity import check_ids, device_of, scoring
from secateur.text.documents import has_chat_template

MAX_NEW_TOKENS = 80


def generate(network: Any, tokenizer: Any, prompt: str) -> str:
    """Generate greedily at most `MAX_NEW_TOKENS` tokens after a prompt, and return their text.

    A model with a chat template answers the prompt; any other model continues it.

    Raises:
        SecateurError: The prompt fills all positions of the model.
    """
    (written,) = greedy_tokens(
        network, [prompt_ids(tokenizer, prompt)], ends=end_tokens(network, tokenizer), new_tokens=MAX_NEW_TOKENS
    )
    return str(tokenizer.decode(written, skip_special_tokens=True)).strip()


def prompt_ids(tokenizer: Any, prompt: str, without_template: str | None = None) -> list[int]:
    """Return the token ids of a prompt, rendered by the tokenizer's chat template if it has one.

    Args:
        tokenizer: The model's tokenizer.
        prompt: The prompt, which is what the user says in a chat.
        without_template: The text to encode where there is no chat template; the prompt itself by default.

    Raises:
        SecateurError: The chat template or the tokenizer refuses the prompt.
    """
    if not has_chat_template(tokenizer):
        return [int(token) for token in encode_start(tokenizer, without_template or prompt)]
    messages = [{"role": "user", "content": prompt}]
    return encode(tokenizer, rendered(tokenizer, messages, add_generation_prompt=True))


def end_tokens(network: Any, tokenizer: Any) -> list[int]:
    """Return the ids of the tokens that end a text, from the generation settings or else from the tokenizer."""
    ends = network.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return [] if ends is None else list(ends) if isinstance(ends, list) else [ends]


def greedy_tokens(
    network: Any,
    prompts: Sequence[Sequence[int]],
    *,
    ends: Sequence[int],
    new_tokens: int,
    on_step: Callable[[], None] | None = None,
) -> list[list[int]]:
    """Generate after several prompts in one batch, always the likeliest token.

    Shorter prompts are padded on the left, and an attention mask hides the padding. The checkpoint's own generation
    settings, such as a penalty for repetition, are not used.

    Args:
        network: A causal language model of transformers.
        prompts: Token ids of each prompt.
        ends: Ids of the tokens that end a text.
        new_tokens: Most tokens after a prompt; fewer where the model has no positions for them.
        on_step: Called before each token is chosen.

    Returns:
        The new token ids after each prompt, without the token that ended the text.

    Raises:
        SecateurError: A prompt fills all positions of the model or has an id that the model lacks, or logits are not
            finite.
    """
    longest = max(map(len, prompts))
    positions = positions_of(network.config) or longest + new_tokens
    if longest >= positions:
        raise SecateurError(
            f"a prompt has {longest:,} tokens, but the model has only {positions:,} positions; shorten it"
        )
    filler = next(iter(ends), 0)
    padded = torch.stack([pad(torch.tensor(ids), (longest - len(ids), 0), value=filler) for ids in prompts])
    check_ids(network, padded)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    settings = GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=min(new_tokens, positions - longest),
        eos_token_id=list(ends) or None,
        pad_token_id=filler,
    )
    before, network.generation_config = network.generation_config, settings
    try:
        with scoring(network), quiet():
            tokens = network.generate(
                padded.to(device_of(network)),
                attention_mask=mask.to(device_of(network)),
                logits_processor=LogitsProcessorList([_EachStep(on_step)]),
            )
    finally:
        network.generation_config = before
    # The tokens before the first one that ends a text.
    return [list(takewhile(lambda token: token not in ends, row)) for row in tokens[:, longest:].tolist()]


class _EachStep(LogitsProcessor):
    """Check of the logits before each token is chosen; the logits are not changed."""

    def __init__(self, on_step: Callable[[], None] | None):
        self._on_step = on_step

    def __call__(self, _: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits (rows x vocabulary)."""
        check_logits(logits.amax(-1))
        if self._on_step is not None:
            self._on_step()
        return logits


def check_logits(largest: torch.Tensor) -> None:
    """Raise `SecateurError` where the largest logit of some token is not finite."""
    if not bool(largest.isfinite().all()):
        raise SecateurError("the model's logits are not finite: its weights are damaged, or its dtype overflows")
