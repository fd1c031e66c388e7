"""Training in half of the memory: weights of the blocks, their gradients and AdamW's moments in bfloat16.

A step of AdamW changes most weights by less than the distance between two numbers of bfloat16, so that rounding to the
nearest would lose the change. Here a value is rounded up or down at random, with the probabilities that keep its mean
(stochastic rounding).
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.optim.adamw import adamw

from secateur.retraining.shares import share_of

AT_ONCE = 2**17
"""Number of weights that are float32 at once during a step: few enough for the processor's cache."""
LOST = 0xFFFF
"""Bits of float32 that bfloat16 lacks."""
SETTINGS: dict[str, Any] = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
SETTINGS |= {"amsgrad": False, "maximize": False}
"""Settings of AdamW, torch's defaults but for the decay."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of AdamW's moments."""


def can_halve(network: Any, blocks: str, products: torch.dtype) -> bool:
    """Return whether the blocks of a network can be trained in bfloat16.

    Where products are float32, each linear layer converts its weight, and other modules would meet two dtypes.
    """
    inside = network.get_submodule(blocks)
    own = {value for layer in inside.modules() if isinstance(layer, nn.Linear) for value in layer.parameters()}
    others = [value for value in inside.parameters() if value.dim() > 1 and value not in own]
    return products == torch.bfloat16 or not others


def convert_in_products(blocks: nn.Module) -> None:
    """Let linear layers multiply in float32 with a copy of their weight, which they do not keep."""
    for layer in blocks.modules():
        if isinstance(layer, nn.Linear):
            layer.forward = partial(_product, layer)  # type: ignore[method-assign]


def _product(layer: nn.Linear, x: Tensor) -> Tensor:
    y: Tensor = _Product.apply(x, layer.weight)
    return y if layer.bias is None else y + layer.bias


class _Product(torch.autograd.Function):
    """Product with a weight of another dtype than the input; only the weight as it is stored is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Return the outputs (... x outputs) of inputs (... x inputs)."""
        ctx.save_for_backward(x, weight)
        return linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of input and weight."""
        x, weight = ctx.saved_tensors
        (above,) = gradients
        own = above.flatten(0, -2).T @ x.flatten(0, -2)
        return above @ weight.to(above.dtype), own.to(weight.dtype)


class HalvedAdamW(torch.optim.Optimizer):
    """AdamW of torch, computed in float32 for some weights at a time, and rounded at random to the weights' dtype."""

    def __init__(self, values: Iterable[nn.Parameter], seed: int):
        super().__init__(values, {"lr": 0.0})
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change the weights along their gradients. `closure` is not used."""
        for group in self.param_groups:
            for number, value in enumerate(group["params"]):
                if value.grad is not None:
                    self._change(number, value, group["lr"])

    def _change(self, number: int, value: nn.Parameter, rate: float) -> None:
        """Change one tensor, whose number chooses its random numbers."""
        state = self.state[value]
        if not state:
            state.update(
                {moment: torch.zeros_like(value) for moment in MOMENTS}, step=torch.zeros((), device=value.device)
            )
        tensors = [share_of(one) for one in (value, *(state[moment] for moment in MOMENTS), value.grad)]
        # The same numbers after a training was resumed.
        random = torch.Generator(tensors[0].device).manual_seed(hash((self._seed, int(state["step"]), number)) % 2**63)
        for weights, mean, square, gradient in zip(*(one.view(-1).split(AT_ONCE) for one in tensors), strict=True):
            exact = new_weights, _, new_mean, new_square = [one.float() for one in (weights, gradient, mean, square)]
            cast(Any, adamw)(*([one] for one in exact), [], [state["step"].clone()], fused=True, lr=rate, **SETTINGS)
            noise = torch.empty_like(weights, dtype=torch.int32).random_(generator=random)
            weights.copy_(_rounded(new_weights, noise & LOST))
            mean.copy_(new_mean)
            square.copy_(_rounded(new_square, noise >> 15))
        state["step"] += 1


def _rounded(values: Tensor, noise: Tensor) -> Tensor:
    """Return float32 values as numbers of bfloat16, rounded up in size with the probability that keeps the mean.

    Args:
        values: The values, which are overwritten.
        noise: Random integers from 0 to `LOST`.
    """
    return values.view(torch.int32).add_(noise).bitwise_and_(~LOST).view(torch.float32)
