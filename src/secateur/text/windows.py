"""Token ids of a text, and random windows of them."""

import torch
from torch import Tensor

from secateur.base.errors import SecateurError


def checked_ids(ids: list[int], vocab_size: int) -> Tensor:
    """Return token ids as an int64 tensor, and raise `SecateurError` where the model's embedding has no such id."""
    if ids and max(ids) >= vocab_size:
        raise SecateurError(
            f"the tokenizer gives id {max(ids)}, but the model has {vocab_size} ids: "
            "use the tokenizer that belongs to the model"
        )
    return torch.tensor(ids, dtype=torch.int64)


def windows(ids: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Draw windows of a text at random.

    The text is cut into windows from a random offset on, and windows are drawn without repetition. Where the text has
    too few windows, it is cut and drawn from again, from another offset.

    Args:
        ids: Token ids of the whole text, at least one (tokens).
        count: Number of windows.
        length: Tokens in a window.

    Returns:
        Token ids (count x length).
    """
    drawn: list[Tensor] = []
    while missing := count - sum(map(len, drawn)):
        if len(ids) < length:
            ids = ids.repeat(-(-length // len(ids)))
        # The first time, an offset costs no window that is needed; later it gives windows that were not drawn yet.
        spare = len(ids) if drawn else max(0, len(ids) - missing * length)
        offset = int(torch.randint(min(length, len(ids) - length + 1, spare + 1), (1,), generator=generator))
        available = ids[offset : offset + (len(ids) - offset) // length * length].view(-1, length)
        drawn.append(available[torch.randperm(len(available), generator=generator)[:missing]])
    return torch.cat(drawn) if drawn else ids.new_empty(0, length)
