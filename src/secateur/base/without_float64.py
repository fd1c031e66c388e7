"""Devices without float64, such as GPUs of Apple: what is float64 is on the CPU.

On such a device, forward passes and products run as on any other. A tensor that becomes float64 moves to the CPU, and
so does a tensor of the device that meets one on the CPU. What follows from sums in float64, such as the solution of a
least-squares problem, therefore stays on the CPU, until it is sent to the device or put into a tensor there.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_AS_IS = {"__get__", "__set__", "_has_compatible_shallow_copy_type"}
"""Functions whose tensors may be on different devices."""
_IN_PLACE = {"__getitem__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}
_ENTERED: set[str] = set()


def sum_on_cpu(device: torch.device) -> None:
    """Keep float64 tensors of a device on the CPU, for the rest of this process."""
    if device.type not in _ENTERED:
        _ENTERED.add(device.type)
        SumsOnCpu(device.type).__enter__()


class SumsOnCpu(TorchFunctionMode):
    """Mode in which the float64 tensors of one type of device are on the CPU."""

    def __init__(self, kind: str):
        super().__init__()
        self._kind = kind

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, with its tensors moved to one device if they must be."""
        kwargs = kwargs or {}
        place = self._place(func, args, kwargs)
        return func(*args, **kwargs) if place is None else self._called(func, place, args, kwargs)

    def _place(self, func: Any, args: Any, kwargs: Any) -> torch.device | None:
        """Return where a call happens; None if it stays as it is."""
        values = [*_flat((*args, *kwargs.values()))]
        tensors = [value for value in values if isinstance(value, Tensor)]
        kinds = {value.device.type for value in tensors if value.dim() or value.device.type == self._kind}
        is_sent = any(self._names_it(value) for value in values)
        if func.__name__ in _AS_IS or not (is_sent or self._kind in kinds):
            return None
        asked = [value for value in values if isinstance(value, torch.dtype)]
        dtypes = asked or ([value.dtype for value in tensors[:1]] if is_sent else [])
        if func is Tensor.double or torch.float64 in dtypes:
            return CPU
        if is_sent or len(kinds) == 1:
            return None
        owner = kwargs["out"] if "out" in kwargs else args[0] if _stays(func.__name__) else None
        return CPU if owner is None else owner.device

    def _names_it(self, value: Any) -> bool:
        """Return whether a value names the device."""
        return isinstance(value, str | torch.device) and str(value).partition(":")[0] == self._kind

    def _called(self, func: Callable[..., Any], place: torch.device, args: Any, kwargs: Any) -> Any:
        """Call a function with its tensors at a place, which a device that it names becomes too."""

        def moved(value: Any) -> Any:
            if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
                return type(value)([moved(one) for one in value])
            if self._names_it(value):
                return place
            if not isinstance(value, Tensor) or value.device.type == place.type:
                return value
            return (value.float() if value.dtype == torch.float64 else value).to(place)

        return func(*moved(args), **{name: moved(value) for name, value in kwargs.items()})


def _stays(function: str) -> bool:
    """Return whether a function reads or changes its first tensor where it is."""
    return function in _IN_PLACE or (function.endswith("_") and not function.endswith("__"))


def _flat(values: Any) -> Iterator[Any]:
    """Yield values, and those inside lists and tuples."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value
