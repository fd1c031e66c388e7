"""Where to compute."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from secateur.base.errors import SecateurError
from secateur.base.launcher import process_place


def pick_device(name: str) -> torch.device:
    """The device by name; `auto` takes a GPU if there is one. Processes of one run take a GPU each, in their order."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and process_place().size > 1 and torch.cuda.is_available():
        name = f"cuda:{process_place().local}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SecateurError(f"device '{name}' is not available here; use --device auto or cpu") from error
    try:
        torch.empty(1, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError) as error:
        # Apple's GPUs.
        raise SecateurError(f"device '{name}' has no float64, in which sums are kept here; use --device cpu") from error
    if device.type == "meta":
        raise SecateurError("device 'meta' computes nothing; use --device auto or cpu")
    return device


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the device; to a GPU it is copied while the program goes on, from memory that stays put."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def fast_dtype(device: torch.device) -> torch.dtype:
    """What to multiply in where float32 is not needed: bfloat16 where there are instructions for it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # Since torch 2.11 or so; without it, float32 is slower and as good.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    units = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if units else torch.float32


@contextmanager
def reduced_precision_matmul(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Let products of float32 matrices multiply what bfloat16 (TF32 on CUDA) holds of them; sums stay float32.

    Nothing changes where `dtype`, what is wanted, is float32. For sums over many tokens, where roundings cancel; never
    for solves.
    """
    backends: Any = torch.backends
    kinds = {"cpu": (backends.mkldnn.matmul, "bf16"), "cuda": (backends.cuda.matmul, "tf32")}
    if dtype == torch.float32 or device.type not in kinds:
        yield
        return
    backend, rounded = kinds[device.type]
    before = backend.fp32_precision
    backend.fp32_precision = rounded
    try:
        yield
    finally:
        backend.fp32_precision = before
