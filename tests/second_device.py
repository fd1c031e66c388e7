"""A second torch device that, like a GPU, refuses operations with tensors of two devices; it computes on the CPU.

`python second_device.py OUTCOMES < CASES` runs command lines of secateur, a JSON list of pairs: the words of a command
and the devices on which it runs. The name of the device is put in place of `{device}`. Devices are `cpu`, `second`, and
`second without float64`, which refuses float64. The script writes a list with what went wrong in each case.
The script needs a process of its own, since a device stays registered in torch.
"""

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
NAME, WITHOUT = "second", "second without float64"
CROSSING = {aten._to_copy.default, aten.to.device, aten.to.dtype_layout, aten.copy_.default}
"""Operations that copy tensors from one device to another."""
HAS_FLOAT64 = True
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
"""Operations that accept indices on the CPU."""


class There(Tensor):
    """Tensor on the second device, with its values in the CPU tensor `here`."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "There":
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
                # The choice of a kernel does not know this device.
                return _attention(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _carried_out(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Mode that also catches operations that create tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _carried_out(func, args, kwargs or {})


def tree_map(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to all leaves of tuples, lists and dictionaries; torch's own version is far slower."""
    if isinstance(value, tuple | list):
        return type(value)([tree_map(function, part) for part in value])
    if isinstance(value, dict):
        return {key: tree_map(function, part) for key, part in value.items()}
    return function(value)


def tree_leaves(value: Any) -> list[Any]:
    """Return all leaves of tuples, lists and dictionaries."""
    found: list[Any] = []
    tree_map(found.append, value)
    return found


def _here(value: Any) -> Any:
    """Return the CPU tensor of a tensor, and the CPU in place of the second device."""
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value.here if isinstance(value, There) else value


def _check(func: Any, args: Any, kwargs: Any) -> None:
    """Raise RuntimeError for tensors of two devices; numbers and indices may be on the CPU, as for a GPU."""
    if func in INDEXING:
        args = (args[0], [at for at in args[1] if isinstance(at, There)], *args[2:])
    kinds = {
        isinstance(value, There)
        for value in tree_leaves((args, kwargs))
        if isinstance(value, There) or (isinstance(value, Tensor) and value.dim())
    }
    if len(kinds) > 1 and func not in CROSSING:
        raise RuntimeError(f"{func} is given tensors of both devices")


def _refuse_float64(value: Any) -> None:
    if isinstance(value, Tensor) and value.dtype == torch.float64:
        raise TypeError(f"{NAME} has no float64")


def _carried_out(func: Any, args: Any, kwargs: Any) -> Any:
    _check(func, args, kwargs)
    if func is aten.copy_.default:
        _here(args[0]).copy_(_here(args[1]))
        return args[0]
    leaves = tree_leaves([args, kwargs])
    devices = [value for value in leaves if isinstance(value, torch.device)]
    goes = devices[0].type == NAME if devices else any(isinstance(value, There) for value in leaves)
    found = func(*tree_map(_here, args), **tree_map(_here, kwargs))
    if goes and not HAS_FLOAT64:
        tree_map(_refuse_float64, found)
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
    """Make the device usable inside the context; `prepare` must have been called."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Mode():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def prepare() -> None:
    """Register the device in torch, for the rest of the process."""
    _setup_privateuseone_for_python_backend(NAME)
    # lm-eval enters a disabled autocast context, which calls this function.
    getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]
    torch.accelerator.synchronize = lambda *_: None
    # On some CPUs secateur multiplies in bfloat16, and so would compute differently from the second device.
    torch.cpu.get_capabilities = dict


def check_blocks() -> None:
    """Let every block that runs check that its weights are on the device of the run."""
    from secateur.model.stream import BlockStream

    run = BlockStream.run

    def checked(stream: Any, index: int, layer: Any, *given: Any, **named: Any) -> Any:
        places = {value.device.type for value in layer.parameters()}
        assert places <= {stream.device.type}, f"block {index} has weights on {places}"
        return run(stream, index, layer, *given, **named)

    BlockStream.run = checked  # type: ignore[method-assign]


def main() -> None:
    prepare()
    from secateur.cli.app import app

    check_blocks()

    global HAS_FLOAT64
    cases = json.load(sys.stdin)
    outcomes = [""] * len(cases)
    for device in ("cpu", NAME, WITHOUT):
        HAS_FLOAT64 = device != WITHOUT
        for number, (case, devices) in enumerate(cases):
            if device not in devices:
                continue
            arguments = [part.replace("{device}", device) for part in case]
            try:
                with contextlib.nullcontext() if device == "cpu" else second_device():
                    app([*arguments, "--device", device.replace(WITHOUT, NAME)], standalone_mode=False)
            except Exception:
                outcomes[number] += f"{device}: {traceback.format_exc()}"
    Path(sys.argv[1]).write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
