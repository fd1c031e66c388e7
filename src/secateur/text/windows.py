"""Ids of a text, and random windows of them."""

import torch
from torch import Tensor

from secateur.base.errors import SecateurError


def checked(ids: list[int], vocab_size: int) -> Tensor:
    """Ids that the model has, int64."""
    if ids and max(ids) >= vocab_size:
        raise SecateurError(
            f"the tokenizer gives id {max(ids)}, but the model has {vocab_size} ids: "
            "take the tokenizer that belongs to the model"
        )
    return torch.tensor(ids, dtype=torch.int64)


def windows(ids: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Cut ids behind a random offset, and draw windows without repetition while there are any; then once more.

    Args:
        ids: of a whole text (tokens), at least one.

    Returns:
        [count, length]
    """
    drawn: list[Tensor] = []
    while missing := count - sum(map(len, drawn)):
        if len(ids) < length:
            ids = ids.repeat(-(-length // len(ids)))
        spare = max(0, len(ids) - missing * length)
        offset = int(torch.randint(min(length, len(ids) - length + 1, spare + 1), (1,), generator=generator))
        all_of_them = ids[offset : offset + (len(ids) - offset) // length * length].view(-1, length)
        drawn.append(all_of_them[torch.randperm(len(all_of_them), generator=generator)[:missing]])
    return torch.cat(drawn) if drawn else ids.new_empty(0, length)
