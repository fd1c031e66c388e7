"""Where to compute."""

from __future__ import annotations

import torch

from secateur.errors import SecateurError


def pick_device(name: str) -> torch.device:
    """The device by name; `auto` takes a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SecateurError(f"device '{name}' is not available here; use --device auto or cpu") from error
    if device.type == "meta":
        raise SecateurError("device 'meta' computes nothing; use --device auto or cpu")
    return device
