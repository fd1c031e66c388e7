"""Text that a model generates after a prompt, for people to read beside another model's text."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from secateur.base.errors import SecateurError
from secateur.base.quiet import quiet
from secateur.model.facts import positions_of
from secateur.model.tokens import encode

MAX_NEW_TOKENS = 80


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise `SecateurError` where a prompt is empty."""
    if any(not prompt.strip() for prompt in prompts):
        raise SecateurError("a prompt is empty; give some words for the models to continue")


@torch.inference_mode()
def generate(network: Any, tokenizer: Any, prompt: str) -> str:
    """Generate greedily at most `MAX_NEW_TOKENS` tokens after a prompt, and return their text.

    A model with a chat template answers the prompt; any other model continues it.

    Raises:
        SecateurError: The prompt fills all positions of the model.
    """
    ids = prompt_ids(tokenizer, prompt)
    positions = positions_of(network.config) or len(ids) + MAX_NEW_TOKENS
    if len(ids) >= positions:
        raise SecateurError(
            f"a prompt has {len(ids):,} tokens, but the model has only {positions:,} positions; shorten it"
        )
    ends = network.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=min(MAX_NEW_TOKENS, positions - len(ids)),
        eos_token_id=ends,
        pad_token_id=ends[0] if isinstance(ends, list) else ends,
    )
    begin = torch.tensor([ids], device=next(network.parameters()).device)
    with quiet():
        tokens = network.generate(begin, attention_mask=torch.ones_like(begin), generation_config=settings)
    return str(tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True)).strip()


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Return the token ids of a prompt, rendered by the tokenizer's chat template if it has one."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return [int(token) for token in encoded["input_ids"]]
    return [int(token) for token in encode(tokenizer, prompt, special=True)]
