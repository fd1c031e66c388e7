"""A device beside the CPU that, like a GPU, refuses to mix with it; its tensors are computed on the CPU all the same.

`python second_device.py OUTCOMES < CASES`, a JSON list of command lines of secateur with `{device}` where the device
goes, carries each out on the CPU and on the other device and writes what went wrong, a list as long. That is a process
of its own since torch knows the device for the rest of it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
NAME = "second"
CROSSING = {aten._to_copy.default, aten.to.device, aten.to.dtype_layout, aten.copy_.default}
"""What takes tensors from one device to another."""
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
"""What takes indices from the CPU too."""


class There(Tensor):
    """A tensor on the second device; `here` is what it holds."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        # Operations run in inference mode would leave views that nothing may be done with outside of it.
        with torch.inference_mode(False):
            result = Tensor._make_wrapper_subclass(
                cls,
                here.size(),
                strides=here.stride(),
                storage_offset=here.storage_offset(),
                dtype=here.dtype,
                device=torch.device(NAME, 0),
            )
        result.here = here
        return result

    def __repr__(self, **_: Any) -> str:
        return f"There({self.here})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            return args[0].here.tolist()
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.nn.functional.scaled_dot_product_attention:
                # What it chooses its kernel by knows no such device.
                return _attention(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _carried_out(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Sees operations that make tensors too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _carried_out(func, args, kwargs or {})


def tree_map(function: Callable[[Any], Any], value: Any) -> Any:
    """A function of all that tuples, lists and dictionaries hold; torch's own takes most of a test's time."""
    if isinstance(value, tuple | list):
        return type(value)([tree_map(function, part) for part in value])
    if isinstance(value, dict):
        return {key: tree_map(function, part) for key, part in value.items()}
    return function(value)


def tree_leaves(value: Any) -> list[Any]:
    """All that tuples, lists and dictionaries hold."""
    found: list[Any] = []
    tree_map(found.append, value)
    return found


def _here(value: Any) -> Any:
    """What an operation on the CPU is given in place of a value."""
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value.here if isinstance(value, There) else value


def _check(func: Any, args: Any, kwargs: Any) -> None:
    """Numbers, and indices of one tensor into another, may come from the CPU, as on a GPU; nothing else."""
    if func in INDEXING:
        args = (args[0], [at for at in args[1] if isinstance(at, There)], *args[2:])
    kinds = {
        isinstance(value, There)
        for value in tree_leaves((args, kwargs))
        if isinstance(value, There) or (isinstance(value, Tensor) and value.dim())
    }
    if len(kinds) > 1 and func not in CROSSING:
        raise RuntimeError(f"{func} is given tensors of both devices")


def _carried_out(func: Any, args: Any, kwargs: Any) -> Any:
    _check(func, args, kwargs)
    if func is aten.copy_.default:
        _here(args[0]).copy_(_here(args[1]))
        return args[0]
    leaves = tree_leaves([args, kwargs])
    devices = [value for value in leaves if isinstance(value, torch.device)]
    goes = devices[0].type == NAME if devices else any(isinstance(value, There) for value in leaves)
    found = func(*tree_map(_here, args), **tree_map(_here, kwargs))
    known = {id(_here(value)): value for value in leaves if isinstance(value, Tensor)}

    def outer(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.is_meta:
            return value
        before = known.get(id(value))
        if before is not None and isinstance(before, There) == goes:
            return before
        if before is not None:
            # Two devices never share memory.
            value = value.clone()
        return There(value) if goes else value

    return tree_map(outer, found)


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **how: Any) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        zero = torch.zeros(attn_mask.shape, dtype=query.dtype, device=attn_mask.device)
        attn_mask = zero.masked_fill(~attn_mask, -torch.inf)
    return aten._scaled_dot_product_attention_math(query, key, value, attn_mask, **how)[0]


@contextmanager
def second_device() -> Iterator[None]:
    """The device is there, once this process has prepared for it."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Mode():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def prepare() -> None:
    """Make the device known to torch, for good."""
    _setup_privateuseone_for_python_backend(NAME)
    # lm-eval asks for autocast, switched off, which asks for this all the same.
    getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]
    torch.accelerator.synchronize = lambda *_: None
    # One CPU multiplies in bfloat16 where it can, and so would differ from the other device.
    torch.cpu.get_capabilities = dict


def main() -> None:
    prepare()
    from secateur.cli.app import app

    outcomes = []
    for case in json.load(sys.stdin):
        outcome = ""
        for device in ("cpu", NAME):
            arguments = [part.replace("{device}", device) for part in case]
            try:
                with second_device() if device == NAME else contextlib.nullcontext():
                    app([*arguments, "--device", device], standalone_mode=False)
            except Exception:
                outcome += f"{device}: {traceback.format_exc()}"
        outcomes.append(outcome)
    Path(sys.argv[1]).write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
