"""Temporary changes to layers while a block runs: watch a layer, replay a stored output, return zeros, record
arguments.

Each change ends with its context manager.

Shapes: b rows of a batch, t positions, d residual width.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.model.structure import PrunableModule


class LayerReached(Exception):
    """Signal by which a hook ends a block's forward pass early."""


class Recorder(nn.Module):
    """Placeholder for a block that records the arguments with which the model calls the block."""

    def __init__(self, original: nn.Module, tupled: bool):
        super().__init__()
        self._tupled = tupled
        # Some models read attributes of their layers, such as the attention type.
        self.__dict__.update({k: v for k, v in vars(original).items() if not k.startswith("_") and k != "training"})
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.input_btd = torch.empty(0)
        self.replacement: Tensor | None = None
        """Output of the placeholder; None for its input."""

    def forward(self, hidden_btd: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the input, or `replacement`."""
        self.input_btd, self.call = hidden_btd, (args, kwargs)
        result = hidden_btd if self.replacement is None else self.replacement
        return (result, None) if self._tupled else result


def repeated(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Iterable[str | int], rows: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a block for a number of rows, from those for one row; see `Family.repeated`."""
    given = dict[str | int, Any](enumerate(args))
    given.update(dict(kwargs))
    given |= {name: torch.cat([given[name]] * rows) for name in names if given.get(name) is not None}
    return tuple(given[place] for place in range(len(args))), {name: given[name] for name in kwargs}


@contextmanager
def watched(module: nn.Module, function: Callable[[Tensor, Tensor], None], *, stop: bool) -> Iterator[None]:
    """Call a function with a layer's input and output; with `stop`, with its input alone, and end the forward there."""

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        function(args[0], args[0].new_empty(0))
        raise LayerReached

    def after(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        # A mixture may return router scores after its output.
        function(args[0], output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_pre_hook(before) if stop else module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def replayed(
    layer: nn.Module, module: PrunableModule, hidden_btd: Tensor, value: Tensor | None, provides_keys: bool
) -> AbstractContextManager[None]:
    """Let a module return a stored output.

    Args:
        layer: The filled block.
        module: Its module.
        hidden_btd: Residual stream before the block.
        value: Output to return; None for zeros.
        provides_keys: Whether the module must still run, because later blocks attend to its keys and values.
    """
    output = torch.zeros_like(hidden_btd) if value is None else value.to(hidden_btd.device)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if provides_keys:
            part = layer.get_submodule(str(module.path))
            type(part).forward(part, *args, **kwargs)
        # Some blocks add to the output in place.
        return _of(output.clone(), module.outputs)

    def narrow(hidden: Tensor) -> Tensor:
        return hidden[..., :1]

    def flat(hidden: Tensor) -> Tensor:
        # The layers are children of the block itself, which may have flattened rows and positions into one dimension.
        return output.reshape(hidden.shape[:-1] + output.shape[-1:])

    changes = {module.path: forward} if module.path else {module.output_layer: flat}
    if not module.path and module.input_projections:
        changes[module.input_layer] = narrow
    return _computing({layer.get_submodule(path): function for path, function in changes.items()})


def zeroed(module: nn.Module, like: Tensor, outputs: int = 1) -> AbstractContextManager[None]:
    """Let a module return zeros of the shape of `like`, as the first of a number of outputs."""
    return _computing({module: lambda *_, **__: _of(torch.zeros_like(like), outputs)})


def _of(output: Tensor, outputs: int) -> Any:
    """Return an output as a module with several outputs returns it."""
    return (output, *[None] * (outputs - 1)) if outputs > 1 else output


@contextmanager
def _computing(functions: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules compute other functions."""
    for module, function in functions.items():
        module.__dict__["forward"] = function
    try:
        yield
    finally:
        for module in functions:
            del module.__dict__["forward"]
