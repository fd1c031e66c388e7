"""Recorded run of a tiny model: what its modules received and returned, and which outputs feed which inputs."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from secateur.base.errors import SecateurError
from secateur.model.hooks import repeated

LENGTH = 12
"""Number of tokens of the recorded row."""


class Call(NamedTuple):
    """Arguments and output of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def first(value: Any) -> Any:
    """Return the first entry of a tuple or list, and any other value itself."""
    return value[0] if isinstance(value, (tuple, list)) else value


def same(one: Any, other: Any) -> bool:
    """Return whether two values are equal tensors; tensors of different shapes may hold the same entries."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)) or one.numel() != other.numel():
        return False
    return torch.allclose(one.reshape(-1), other.reshape(-1).to(one.dtype), rtol=1e-9, atol=1e-12)


def is_matrix(module: nn.Module) -> bool:
    """Return whether a module is a layer with one matrix, such as `Linear` or GPT-2's `Conv1D`."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding)


class Feeds(NamedTuple):
    """Outputs of a layer that feed the inputs of another: booleans (inputs x outputs)."""

    last: Tensor
    """Whether the input of the last token depends on the layer's output for the same token."""
    earlier: Tensor
    """Whether it depends on the layer's output for an earlier token."""

    @property
    def any(self) -> Tensor:
        """Whether it depends on the layer's output for any token."""
        return self.last | self.earlier


class BlockProbe:
    """Block of a tiny model with the recorded calls of its modules, in the order in which they returned.

    Attributes:
        calls: Last call of each module, by its path inside the block; the block itself has the path "".
        again: Paths of modules with parameters that were called several times.
        layers: Layers with one matrix that were called, by path.
    """

    def __init__(self, block: nn.Module):
        self.block = block
        self.calls: dict[str, Call] = {}
        self.again: set[str] = set()

    @property
    def layers(self) -> dict[str, nn.Module]:
        """Layers with one matrix that were called, by path, in the order of their calls."""
        modules = dict(self.block.named_modules())
        found = {path: modules[path] for path in self.calls if path and is_matrix(modules[path])}
        # A router returns gates, not products.
        return {path: layer for path, layer in found.items() if isinstance(self.calls[path].output, Tensor)}

    @property
    def hidden(self) -> Tensor:
        """The block's input from the residual stream (1 x t x d)."""
        args, kwargs, _ = self.calls[""]
        found: Tensor = args[0] if args else kwargs["hidden_states"]
        return found

    def run(self, path: str = "") -> Any:
        """Return the first output of the block or a module of it, called again with its recorded arguments."""
        args, kwargs, _ = self.calls[path]
        # A block may change its arguments in place.
        args, kwargs = tree_map(_copied, (args, kwargs))
        return first(self.block.get_submodule(path)(*args, **kwargs))

    def run_as(self, block: nn.Module, rows: int = 1, names: Iterable[str | int] = ()) -> Any:
        """Return the first output of another block for the recorded row, several times in a batch.

        Args:
            block: The block.
            rows: Number of times.
            names: Arguments that the batch needs once for each row; see `Family.repeated`.
        """
        args, kwargs = tree_map(_copied, self.calls[""][:2])
        kwargs.pop("hidden_states", None)
        args, kwargs = repeated(args[1:], kwargs, names, rows)
        return first(block(torch.cat([self.hidden] * rows), *args, **kwargs))

    def output(self, path: str) -> Any:
        """Return the first output of a recorded call."""
        return first(self.calls[path].output)

    def outputs(self, path: str) -> int:
        """Return the number of values that a module returned; zero if they are in no tuple."""
        output = self.calls[path].output
        return 1 if isinstance(output, Tensor) else len(output) if type(output) is tuple else 0

    def input(self, path: str) -> Any:
        """Return the first input of a recorded call."""
        args, kwargs, _ = self.calls[path]
        return args[0] if args else next((value for value in kwargs.values() if isinstance(value, Tensor)), None)

    def feeds(self, target: str, every_token: bool = False) -> dict[str, Feeds]:
        """Return which outputs of other layers feed each input of a layer directly.

        Layers without any influence are left out.

        Args:
            target: Path of the layer.
            every_token: Whether to look at the inputs of all tokens instead of the last token's.
        """
        leaves: dict[str, Tensor] = {}
        seen: list[Tensor] = []
        with ExitStack() as hooks, torch.enable_grad():
            for path, layer in self.layers.items():

                def cut(_: Any, __: Any, output: Tensor, path: str = path) -> Tensor:
                    leaves[path] = output.detach().requires_grad_()
                    return leaves[path] * 1

                def keep(_: Any, args: tuple[Any, ...]) -> None:
                    seen.append(args[0])

                hook = layer.register_forward_pre_hook(keep) if path == target else layer.register_forward_hook(cut)
                hooks.callback(hook.remove)
            self.run()
            inputs = seen[0].reshape(-1, seen[0].shape[-1])
            columns = inputs.sum(0) if every_token else inputs[-1]
            if not columns.requires_grad:
                return {}
            grads = _gradients(columns, [*leaves.values()])
        tables = {
            path: (grad != 0).reshape(len(columns), -1, grad.shape[-1])
            for path, grad in zip(leaves, grads, strict=True)
            if grad is not None
        }
        result = {path: Feeds(table[:, -1], table[:, :-1].any(1)) for path, table in tables.items()}
        return {path: feeds for path, feeds in result.items() if bool(feeds.any.any())}

    @contextmanager
    def scaled(self, path: str, factor: float) -> Iterator[None]:
        """Multiply the output of a module by a factor."""

        def scale(_: Any, __: Any, output: Any) -> Any:
            if isinstance(output, (tuple, list)):
                return type(output)([output[0] * factor, *output[1:]])
            return output * factor

        hook = self.block.get_submodule(path).register_forward_hook(scale)
        try:
            yield
        finally:
            hook.remove()

    def softmax_heads(self, path: str) -> int | None:
        """Return the number of heads whose scores a module turns into weights with a softmax; None without one."""
        watch = _Softmax()
        with watch, torch.no_grad():
            self.run(path)
        return watch.heads


class _Softmax(TorchFunctionMode):
    """Record of the number of rows of scores in calls of softmax."""

    heads: int | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        scores: Any = args[0] if args else None
        is_softmax = getattr(func, "__name__", "") == "softmax" and isinstance(scores, Tensor)
        # The last axis may have an attention sink beside the keys.
        if is_softmax and scores.dim() in (3, 4) and scores.shape[-2] == LENGTH <= scores.shape[-1]:
            self.heads = self.heads or scores.shape[-3]
        return func(*args, **(kwargs or {}))


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _gradients(columns: Tensor, leaves: list[Tensor]) -> Sequence[Tensor | None]:
    """Return the gradients of each column with respect to each tensor (columns x the tensor's shape)."""
    every = torch.eye(len(columns), dtype=columns.dtype)
    try:
        return torch.autograd.grad(columns, leaves, every, retain_graph=True, allow_unused=True, is_grads_batched=True)
    except RuntimeError:
        # Not every function can be computed for several columns at once.
        rows = [torch.autograd.grad(columns, leaves, one, retain_graph=True, allow_unused=True) for one in every]
        return [None if grads[0] is None else torch.stack(grads) for grads in zip(*rows, strict=True)]


def find_blocks(model: nn.Module, number: int) -> str:
    """Return the path of the list of blocks: the list of this length with the most parameters.

    Raises:
        SecateurError: There is no such list.
    """
    lists = {path: part for path, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    sizes = {path: sum(p.numel() for p in part.parameters()) for path, part in lists.items() if len(part) == number}
    if not sizes:
        raise SecateurError(f"its class has no list of {number} blocks")
    return max(sizes, key=lambda path: sizes[path])


def record(model: nn.Module, blocks: str, ids: Tensor) -> tuple[list[BlockProbe], dict[str, Call]]:
    """Run a model on one row of tokens; return its blocks' calls, and the calls of modules outside blocks by path."""
    layers = [*model.get_submodule(blocks).children()]
    probes = [BlockProbe(layer) for layer in layers]
    outside: dict[str, Call] = {}
    with ExitStack() as hooks, torch.no_grad():

        def watch(module: nn.Module, path: str, calls: dict[str, Call], again: set[str]) -> None:
            given: list[tuple[Any, Any]] = []

            def begin(_: Any, args: Any, kwargs: Any) -> None:
                # Copied before the call, which may change them in place.
                given.append(tree_map(_copied, (args, kwargs)))

            def end(_: Any, __: Any, output: Any) -> None:
                again.update({path} & calls.keys() if [*module.parameters(recurse=False)] else ())
                # The last call: some models apply the norm after the last block to the embedding too.
                values, named = given.pop()
                calls[path] = Call(values, named, tree_map(_copied, output))

            hooks.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(end).remove)

        for path, module in model.named_modules():
            if not path.startswith(f"{blocks}."):
                watch(module, path, outside, set())
        for probe in probes:
            for path, module in probe.block.named_modules():
                watch(module, path, probe.calls, probe.again)
        model(ids, use_cache=False)
    return probes, outside
