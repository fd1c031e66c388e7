"""Experts of a filled block as modules: each is a feed-forward, whose matrices are read when it runs.

transformers has one tensor for the matrices of all experts of a block. A filled block has `Experts` in the place of the
module with these tensors. It computes the same, one expert after the other.

Gate and up projection of an expert are one layer, as in transformers, so that one product computes both.

Shapes: n tokens, d residual width, k experts per token, f channels of an expert.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from secateur.base.memory import MemoryBudget, release_freed_memory
from secateur.checkpoints.expert_matrices import ExpertMatrices, KeptMatrices
from secateur.model.axes import Axis
from secateur.model.hooks import LayerReached, watched
from secateur.model.structure import PrunableModule, Slab, input_projection, output_projection
from secateur.model.units.channels import CHANNELS
from secateur.model.units.experts import layout_of


class Experts(nn.Module):
    """Experts of a block; indexing returns one of them.

    Attributes:
        gate_up_proj, down_proj: Matrices of all experts.
        numbers: Numbers in the dense block of the experts that exist.
        see: Function that is called with the name of a layer of an expert, the expert's number, and the layer's input
            in a forward pass of the block; None for no function.
    """

    see: Callable[[str, int, Tensor], None] | None = None

    def __init__(self, original: Any, gate_up_proj: ExpertMatrices, down_proj: ExpertMatrices):
        """Take over activation and layout of the module with the tensors of all experts."""
        super().__init__()
        self.gate_up_proj, self.down_proj, self.layout = gate_up_proj, down_proj, layout_of(original)
        self.numbers = list(range(down_proj.shape[0]))
        self._apply_gate = getattr(original, "_apply_gate", None)
        self._activation = getattr(original, "act_fn", None)

    def __getitem__(self, number: int) -> "Expert":
        return Expert(self, number)

    def forward(self, x_nd: Tensor, places_nk: Tensor | None = None, gates_nk: Tensor | None = None) -> Tensor:
        """Return the sum of the outputs of each token's experts times their gates.

        Args:
            x_nd: Inputs of the experts; without `places_nk`, the inputs of each expert one after the other, and the
                outputs are not summed.
            places_nk: Places of each token's experts in `numbers`.
            gates_nk: Gates of these experts.
        """
        if places_nk is None or gates_nk is None:
            parts = x_nd.view(len(self.numbers), -1, x_nd.shape[1])
            return torch.cat([self[number](part) for number, part in zip(self.numbers, parts, strict=True)])
        total = torch.zeros_like(x_nd)
        for place in places_nk.unique().tolist():
            ranks, tokens = torch.where((places_nk == place).T)
            y = self[self.numbers[place]](x_nd[tokens]) * gates_nk[tokens, ranks, None]
            total.index_add_(0, tokens, y.to(total.dtype))
        return total

    def activated(self, projected: Tensor) -> Tensor:
        """Return the inputs of output projections (n x f) from the outputs of gate and up projections (n x 2f)."""
        if self._apply_gate is not None:
            return cast(Tensor, self._apply_gate(projected))
        assert self._activation is not None
        gate, up = projected.chunk(2, dim=-1)
        return cast(Tensor, up * self._activation(gate))


class Expert(Mapping[str, Tensor]):
    """Feed-forward of one expert, and its tensors by name, each copied to float32 when it is read."""

    def __init__(self, experts: Experts, number: int):
        self._experts, self._number = experts, number

    def __getitem__(self, name: str) -> Tensor:
        layer, _, kind = name.rpartition(".")
        found = self._bias(layer) if kind == "bias" else getattr(self._experts, layer).read(self._number)
        if found is None:
            raise KeyError(name)
        return found.to(torch.float32, copy=True)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(slab.name for slab in self.module.slabs))

    def __len__(self) -> int:
        return len(list(iter(self)))

    @property
    def module(self) -> PrunableModule:
        """Description of the feed-forward, in which gate and up projection are one fused layer."""
        layout, axis = self._experts.layout, 0 if self._experts.layout.inputs_first else 1
        channels = self._experts.down_proj.shape[1 + axis]
        down = Slab("down_proj.weight", axis, (CHANNELS,), channels, 1)
        # Outputs of gate and up alternate, or all outputs of gate come first. Up is listed first, as everywhere.
        starts, gap = ((1, 0), 1) if layout.in_turn else ((channels, 0), 0)
        leaves = {"weight": 1 - axis} | ({"bias": 0} if layout.biased else {})
        slabs = (
            replace(down, name=f"gate_up_proj.{leaf}", axis=axis, offset=start, gap=gap)
            for start in starts
            for leaf, axis in leaves.items()
        )
        return PrunableModule("channels", (Axis(CHANNELS, channels),), tuple(slabs), down, None, None, None)

    @property
    def weight(self) -> Tensor:
        """Weight of the output projection (f x d)."""
        return self._product_matrix(self._experts.down_proj)

    @property
    def bias(self) -> Tensor | None:
        """Bias of the output projection (d); None without one."""
        return self._bias("down_proj")

    def __call__(self, x_nd: Tensor) -> Tensor:
        """Return the output (n x d). As in transformers, biases are added after the products, which rounds twice."""
        gate_up, bias = self._product_matrix(self._experts.gate_up_proj), self._bias("gate_up_proj")
        inner = self._experts.activated(_plus(x_nd @ gate_up, bias))
        if self._experts.see is not None:
            self._experts.see("gate_up_proj", self._number, x_nd)
            self._experts.see("down_proj", self._number, inner)
        return _plus(inner @ self.weight, self.bias)

    def rows(self, x_nd: Tensor) -> Tensor:
        """Return the inputs of the output projection (n x f)."""
        return self._experts.activated(self._projected(x_nd))

    def slopes(self, x_nd: Tensor) -> tuple[Tensor, Tensor]:
        """Return the derivatives of `rows` by the outputs of the up and gate projections (n x f each)."""
        projected = self._projected(x_nd)
        # The activation works entry by entry, so that the gradient of the sum is the derivative.
        with torch.inference_mode(False), torch.enable_grad():
            inputs = projected.clone().requires_grad_()
            self._experts.activated(inputs).sum().backward()
        assert inputs.grad is not None
        in_turn = self._experts.layout.in_turn
        gate, up = (inputs.grad[:, ::2], inputs.grad[:, 1::2]) if in_turn else inputs.grad.chunk(2, dim=1)
        return up, gate

    def _projected(self, x_nd: Tensor) -> Tensor:
        """Return the outputs of the gate and up projections (n x 2f)."""
        return linear(x_nd, self._product_matrix(self._experts.gate_up_proj).T, self._bias("gate_up_proj"))

    def _bias(self, layer: str) -> Tensor | None:
        return self._experts.get_parameter(f"{layer}_bias")[self._number] if self._experts.layout.biased else None

    def _product_matrix(self, matrices: ExpertMatrices) -> Tensor:
        """Return this expert's matrix with inputs first, in float32.

        Inside autocast it has its stored dtype: converting it twice took a quarter of an expert's forward.
        """
        found = matrices.read(self._number)
        found = found if torch.is_autocast_enabled("cpu") else found.float()
        return found if self._experts.layout.inputs_first else found.T


class SharedExpert(Expert):
    """The shared expert, which is applied to all tokens: an ordinary feed-forward of the model."""

    def __init__(self, feed_forward: Any):
        self._feed_forward = feed_forward

    def __getitem__(self, name: str) -> Tensor:
        parameters: dict[str, Tensor] = dict(self._feed_forward.named_parameters())
        return parameters[name].to(torch.float32, copy=True)

    @property
    def module(self) -> PrunableModule:
        """Description of the feed-forward."""
        layer, channels = self._feed_forward, len(self.weight)
        # Up first, as everywhere.
        parts = (input_projection(layer, name, (CHANNELS,), channels, 1) for name in ("up_proj", "gate_proj"))
        output, _ = output_projection(layer, "down_proj", (CHANNELS,), channels, 1)
        inputs = tuple(slab for slabs in parts for slab in slabs)
        return PrunableModule("channels", (Axis(CHANNELS, channels),), inputs, output, None, None, None)

    @property
    def weight(self) -> Tensor:
        """Weight of the output projection (f x d)."""
        return cast(Tensor, self._feed_forward.down_proj.weight.data.T)

    @property
    def bias(self) -> Tensor | None:
        """Bias of the output projection (d); None without one."""
        return cast("Tensor | None", self._feed_forward.down_proj.bias)

    def rows(self, x_nd: Tensor) -> Tensor:
        """Return the inputs of the output projection (n x f)."""
        seen: list[Tensor] = []
        with suppress(LayerReached), watched(self._feed_forward.down_proj, lambda x, _: seen.append(x), stop=True):
            self._feed_forward(x_nd[None])
        return seen[0][0]


def _plus(y_nd: Tensor, bias_d: Tensor | None) -> Tensor:
    return y_nd if bias_d is None else y_nd + bias_d


@contextmanager
def experts_as_modules(
    layer: nn.Module, stored: Mapping[str, ExpertMatrices], device: torch.device, budget: MemoryBudget
) -> Iterator[None]:
    """Let a block compute with `Experts`, and put back the module that they replace on exit.

    Args:
        layer: The block.
        stored: Matrices of all experts, by the names of their tensors inside the block; empty without experts.
        device: Device of the block.
        budget: Memory in which matrices stay once they were read.
    """
    if not stored:
        yield
        return
    kept = {name: KeptMatrices(matrices, device, budget) for name, matrices in stored.items()}
    path = next(iter(kept)).rpartition(".")[0]
    parent, _, name = path.rpartition(".")
    owner, original = layer.get_submodule(parent), layer.get_submodule(path)
    setattr(owner, name, Experts(original, **{leaf.rpartition(".")[2]: matrices for leaf, matrices in kept.items()}))
    try:
        yield
    finally:
        setattr(owner, name, original)
        for matrices in kept.values():
            matrices.release()
        # Thousands of matrices were allocated and freed, which left two gigabytes of holes in the heap.
        release_freed_memory()
