"""Config keys of sizes: a class is built once more with one number of its config changed, on the meta device."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from secateur.base.quiet import quiet
from secateur.layout.twin import built_on

OTHER = "no key"
"""Result of `factor_key` for a factor that no key holds."""
Getter = Callable[[nn.Module], Any]
"""Function that reads a size from a block."""


class Keys:
    """Keys of a tiny model's config, and how they change one of its blocks."""

    def __init__(self, model: Any, blocks: str, index: int, stated: Mapping[str, Any]):
        """Take over a model, the path of its blocks, the index of one of them, and what the family's entry states."""
        self.stated = stated
        self.config = model.config
        self._block = model.get_submodule(blocks)[index]
        self._class, self._blocks, self._index = type(model), blocks, index
        self._variant = cache(lambda key, value: self.rebuilt({key: value}))

    def rebuilt(self, values: Mapping[str, Any], device: str = "meta") -> nn.Module | None:
        """Return the block of a model with some other config values; None if the class refuses them, or on the CPU, if
        the model does not run."""
        try:
            # Made anew, because some classes check their values only then.
            plain = {key: [*value] if isinstance(value, tuple) else value for key, value in values.items()}
            config = type(self.config).from_dict({**self.config.to_dict(), **plain})
            config._experts_implementation = self.config._experts_implementation
            with quiet(), built_on(device):
                model = self._class._from_config(config).eval()
                if device == "cpu":
                    model(torch.zeros(1, 4, dtype=torch.long), use_cache=False)
        except Exception:
            # Whatever a class raises, it takes no such value.
            return None
        layers = [*model.get_submodule(self._blocks).children()]
        return layers[self._index] if self._index < len(layers) else None

    def of_twin(self, getter: Getter) -> Any:
        """Return a size of the unchanged block."""
        return getter(self._block)

    def changed(self, key: str) -> Callable[[Getter], Any]:
        """Return a function that reads sizes of the block after a key was doubled or, where the class refuses this,
        raised or halved; sizes are None where the class refuses all of these."""
        own = getattr(self.config, key)
        value = own[0] if isinstance(own, list) else own
        news = (new for new in (2 * value, value + 1, value // 2) if new)
        variants = (self._variant(key, new if value is own else (new,) * len(own)) for new in news)
        block = next((one for one in variants if one is not None), None)
        return lambda getter: None if block is None else getter(block)

    def naming(self, value: int, answers: Callable[[Callable[[Getter], Any]], bool]) -> str | None:
        """Return the key with a value whose change changes the block; None if no key does.

        Args:
            value: The value that the key has now.
            answers: Whether a block, read through the given function, shows the change.
        """
        for key, own in vars(self.config).items():
            # A list may hold the number of each block.
            each = isinstance(own, list) and len(own) == self.config.num_hidden_layers
            number = own[self._index] if each else own
            if not key.startswith("_") and type(number) is int and number == value:
                variant = self.changed(key)
                if variant(lambda block: block) is not None and answers(variant):
                    return key
        return None

    @staticmethod
    def shapes(name: str) -> Getter:
        """Return a function that reads the shape of a tensor."""

        def read(block: nn.Module) -> tuple[int, ...]:
            path, _, leaf = name.rpartition(".")
            return tuple(getattr(block.get_submodule(path), leaf).shape)

        return read

    @staticmethod
    def numbers(path: str, *names: str) -> Getter:
        """Return a function that reads the attributes with some names of all modules inside a module."""

        def read(block: nn.Module) -> set[Any]:
            modules = block.get_submodule(path).modules()
            return {vars(module)[name] for module in modules for name in names if name in vars(module)}

        return read


def channels_key(keys: Keys, down: str, axis: int) -> str | None:
    """Return the key of a feed-forward's number of channels; None if the class derives it."""
    shapes = keys.shapes(f"{down}.weight")
    width = keys.of_twin(shapes)[axis]
    found = keys.naming(width, lambda variant: variant(shapes)[axis] != width)
    if found:
        return found
    # A key may hold None, and the class then takes a multiple of another size.
    for key, own in vars(keys.config).items():
        if own is None and not key.startswith("_"):
            block = keys._variant(key, width + 8)
            if block is not None and shapes(block)[axis] == width + 8:
                return key
    return None


def head_counts(keys: Keys, output: str, axis: int, values: Mapping[str, Any]) -> str:
    """Return which numbers of heads a class takes: "any", "divisors" or "dense"; see `secateur.families.family.Family`.

    Args:
        keys: Keys of the model.
        output: Path of the attention's output projection.
        axis: Axis of its weight along which heads lie.
        values: Config values that hold the head size.
    """
    config, shapes = keys.config, keys.shapes(f"{output}.weight")
    heads, entries = config.num_attention_heads, keys.of_twin(shapes)[axis]
    odd = next((number for number in range(heads + 1, 4 * heads) if config.hidden_size % number), heads + 1)
    even = 2 * heads if config.hidden_size % (2 * heads) == 0 else max(heads // 2, 1)
    for number, answer in ((odd, "any"), (even, "divisors")):
        counts = dict.fromkeys(("num_key_value_heads", "num_attention_heads"), number)
        counts = {key: value for key, value in counts.items() if hasattr(config, key)}
        block = keys.rebuilt({**counts, **values}, "cpu")
        if block is not None and shapes(block)[axis] == number * (entries // heads):
            return answer
    return "dense"


def factor_key(config: Any, factor: float) -> str | None:
    """Return the config key of a factor on the outputs of modules; None for one, and `OTHER` if no key has it."""
    if abs(factor - 1) < 1e-9:
        return None
    values = vars(config).items()
    return next((key for key, value in values if type(value) is float and abs(value - factor) < 1e-9), OTHER)
