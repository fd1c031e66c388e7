"""What a model writes behind a prompt, greedily: for people to read side by side."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from secateur.base.errors import SecateurError
from secateur.base.quiet import quiet
from secateur.model.facts import positions_of
from secateur.model.tokens import encode

NEW = 80
"""Tokens at most."""


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise `SecateurError` where one of them is empty."""
    if any(not prompt.strip() for prompt in prompts):
        raise SecateurError("a prompt is empty; give some words that the models are to go on from")


@torch.inference_mode()
def written(network: Any, tokenizer: Any, prompt: str) -> str:
    """The likeliest token after each other, as text, at most `NEW`.

    A model with a chat template is asked; another one goes on with the prompt as it stands.

    Raises:
        SecateurError: the prompt fills all positions.
    """
    ids = prompt_ids(tokenizer, prompt)
    positions = positions_of(network.config) or len(ids) + NEW
    if len(ids) >= positions:
        raise SecateurError(f"a prompt has {len(ids):,} tokens, and the model {positions:,} positions; shorten it")
    ends = network.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    how = GenerationConfig(
        do_sample=False,
        max_new_tokens=min(NEW, positions - len(ids)),
        eos_token_id=ends,
        pad_token_id=ends[0] if isinstance(ends, list) else ends,
    )
    begin = torch.tensor([ids], device=next(network.parameters()).device)
    with quiet():
        found = network.generate(begin, attention_mask=torch.ones_like(begin), generation_config=how)
    return str(tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)).strip()


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt as the tokenizer's chat template puts it, or as it stands."""
    if getattr(tokenizer, "chat_template", None):
        asked = [{"role": "user", "content": prompt}]
        found = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)
        return [int(token) for token in found["input_ids"]]
    return [int(token) for token in encode(tokenizer, prompt, special=True)]
