"""What layers are made to do while a block runs: be watched, give a stored output, stay silent, or keep what they get.

All of it ends with the context manager that began it.

Shapes: b rows of a batch, t positions, d residual width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.model.structure import PrunableModule


class Reached(Exception):
    """Raised by a hook to end a block's forward once what was wanted has been seen."""


class Recorder(nn.Module):
    """Stands in for a block while the model prepares its arguments; passes its input through, or `instead`."""

    def __init__(self, original: nn.Module, tupled: bool):
        super().__init__()
        self._tupled = tupled
        # Some models read attributes of their layers, such as the attention type.
        self.__dict__.update({k: v for k, v in vars(original).items() if not k.startswith("_") and k != "training"})
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.input_btd = torch.empty(0)
        self.instead: Tensor | None = None

    def forward(self, hidden_btd: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What comes in, or `instead`."""
        self.input_btd, self.call = hidden_btd, (args, kwargs)
        result = hidden_btd if self.instead is None else self.instead
        return (result, None) if self._tupled else result


@contextmanager
def watched(module: nn.Module, see: Callable[[Tensor, Tensor], None], *, stop: bool) -> Iterator[None]:
    """Show a layer's input and output; or its input alone, and go no further."""

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        see(args[0], args[0].new_empty(0))
        raise Reached

    def after(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        # A whole mixture may give scores behind its output.
        see(args[0], output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_pre_hook(before) if stop else module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replayed(
    layer: nn.Module, module: PrunableModule, hidden_btd: Tensor, value: Tensor | None, lends: bool
) -> Iterator[None]:
    """Let a module return a stored output in place of computing it, unless it `lends` what it makes on the way."""
    output = torch.zeros_like(hidden_btd) if value is None else value.to(hidden_btd.device)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if lends:
            part = layer.get_submodule(str(module.path))
            type(part).forward(part, *args, **kwargs)
        # Some blocks add to it in place.
        return (output.clone(), None) if module.returns_tuple else output.clone()

    def nothing(hidden: Tensor) -> Tensor:
        return hidden[..., :1]

    def flat(hidden: Tensor) -> Tensor:
        # The layers hang in the block itself, which may have folded rows and positions into one axis.
        return output.reshape(hidden.shape[:-1] + output.shape[-1:])

    changes = {module.path: forward} if module.path else {module.output_layer: flat}
    if not module.path and module.input_projections:
        changes[module.input_layer] = nothing
    for path, function in changes.items():
        layer.get_submodule(path).__dict__["forward"] = function
    try:
        yield
    finally:
        for path in changes:
            del layer.get_submodule(path).__dict__["forward"]


@contextmanager
def silent(module: nn.Module, like: Tensor) -> Iterator[None]:
    """Let a module give zeros of another tensor's shape."""
    module.__dict__["forward"] = lambda *_: torch.zeros_like(like)
    try:
        yield
    finally:
        del module.__dict__["forward"]
