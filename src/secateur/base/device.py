"""Choice of the device and of the precision of large matrix products; time on a device."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch

from secateur.base.errors import SecateurError
from secateur.base.launcher import process_place
from secateur.base.memory import available_bytes, rss_bytes
from secateur.base.without_float64 import sum_on_cpu


def pick_device(name: str) -> torch.device:
    """Return a device that can be computed on.

    Args:
        name: As torch has it, or `auto` for a GPU if there is one, else the CPU. `cuda` is the GPU whose number is the
            local rank of this process.

    Raises:
        SecateurError: The device does not exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and process_place().size > 1 and torch.cuda.is_available():
        name = f"cuda:{process_place().local_rank}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SecateurError(f"device '{name}' is not available here; use --device auto or cpu") from error
    if device.type == "meta":
        raise SecateurError("device 'meta' computes nothing; use --device auto or cpu")
    try:
        torch.empty(1, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):
        sum_on_cpu(device)
    return device


def memory_of(device: torch.device) -> tuple[int, int]:
    """Return the bytes that this process holds in a device's memory, and those that it can have, these included."""
    if device.type != "cuda":
        return rss_bytes(), available_bytes()
    held = torch.cuda.memory_reserved(device)
    return held, held + torch.cuda.mem_get_info(device)[0]


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device. A copy from the CPU to a GPU runs asynchronously, from pinned memory."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def clock(device: torch.device) -> float:
    """Wait until a device has finished its work, and return the time in seconds."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return perf_counter()


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for products that do not need float32: bfloat16 if the device has instructions for it."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # torch before 2.11 cannot tell, and gets float32: slower, but as good.
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        fast = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def reduced_precision_matmul(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Round the factors of float32 matrix products to bfloat16 (on CUDA to TF32); sums stay float32.

    For sums over many tokens, in which rounding errors cancel; never for linear solves.

    Args:
        device: The products' device.
        dtype: Float32 for products that are not rounded.
    """
    backends: Any = torch.backends
    rounding = {"cpu": (backends.mkldnn.matmul, "bf16"), "cuda": (backends.cuda.matmul, "tf32")}
    if dtype == torch.float32 or device.type not in rounding:
        yield
        return
    backend, precision = rounding[device.type]
    before = backend.fp32_precision
    backend.fp32_precision = precision
    try:
        yield
    finally:
        backend.fp32_precision = before
