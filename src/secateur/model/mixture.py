"""Mixture of experts of a loaded block, run by the model's own modules: routes of tokens, and outputs of experts.

Shapes: n tokens, d residual width, k experts per token, f channels of an expert.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from secateur.model.axes import axis_kinds
from secateur.model.experts import Expert, Experts, SharedExpert
from secateur.model.stream import BlockStream
from secateur.model.structure import PrunableModule
from secateur.model.units.experts import EXPERTS, shared_expert

_TOP_K = ("top_k", "num_experts_per_tok")
"""Names that routers have for the number of experts per token."""


class Routes(NamedTuple):
    """Experts of each token, and their gates."""

    experts: Tensor
    """Indices of experts (n x k), in the numbering of the dense block."""
    gates: Tensor
    """Gates (n x k)."""

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return the tokens routed to an expert, and its gate for each of them (m; m)."""
        tokens, places = (self.experts == expert).nonzero(as_tuple=True)
        return tokens, self.gates[tokens, places]


class Mixture:
    """Experts, router and shared expert of a loaded block. The input of the mixture is the input of the router."""

    def __init__(self, stream: BlockStream, layer: nn.Module, module: PrunableModule):
        """Find the experts, the router and the shared expert.

        Args:
            stream: The model.
            layer: The loaded block.
            module: The description of the mixture.
        """
        assert stream.family.experts is not None
        self.stream, self.module, self.names = stream, module, stream.family.experts
        norms = self.names.parallel_norms
        self.parent: Any = layer if norms else layer.get_submodule(module.output_layer)
        """Module that contains the experts and the router."""
        self._norm: Any = layer.get_submodule(norms[0]) if norms else nn.Identity()
        self.experts = cast(Experts, self.parent.get_submodule(self.names.experts))
        self.router: Any = self.parent.get_submodule(self.names.router)
        self.shared: Any = shared_expert(self.names, self.parent)
        self._scale = 1.0 if self.names.scale is None else float(getattr(stream.checkpoint.config, self.names.scale))
        self._shared_number = module.units
        """Index of the shared expert: one more than the last routed expert."""

    @property
    def all_routed(self) -> Tensor:
        """Indices of all routed experts."""
        return torch.arange(self.module.units, device=self.stream.device)

    def with_shared(self, alive: Tensor) -> list[int]:
        """Return the indices of some experts, after the index of the shared expert if there is one."""
        return [*([] if self.shared is None else [self._shared_number]), *alive.tolist()]

    def route(self, x_nd: Tensor, alive: Tensor) -> Routes:
        """Return the routes of tokens if only some experts exist."""
        with self._routing_among(alive), self.stream.layer_products():
            bias = [] if self.names.router_bias is None else [getattr(self.parent, self.names.router_bias)]
            found = self._routes(self.router(x_nd[None] if self.names.batched_router else x_nd, *bias))
        return Routes(alive[found.experts], found.gates.float() * self._scale)

    def output(self, x_btd: Tensor, alive: Tensor) -> Tensor:
        """Return the output of the whole mixture if only some experts exist."""
        if self.names.scales_inputs:
            # The class runs all experts on all tokens at once.
            with self.only(alive), self.stream.layer_products():
                return self.parent(x_btd)[0].float().view_as(x_btd)
        # Experts keep their numbers in the dense block, so that no matrices are copied.
        x_nd = x_btd.flatten(0, 1)
        routes, shared = self.route(x_nd, alive), self.shared_output(x_nd)
        with self.stream.layer_products():
            y_nd = self.experts(self._norm(x_nd), *routes).float()
        return (y_nd if shared is None else y_nd + shared).view_as(x_btd)

    def _routes(self, found: tuple[Tensor, ...]) -> Routes:
        """Return the routes in the output of a router.

        Logits come first, and have the shape of gates if tokens are routed to all remaining experts.
        """
        if self.names.scales_inputs:
            # Logits come last, and gates are in the inputs of experts.
            chosen = found[-1].topk(self.router.top_k, dim=1).indices
            return Routes(chosen, torch.ones_like(chosen, dtype=torch.float32))
        chosen = next(part for part in found if not part.is_floating_point())
        floats = [part for part in found if part.is_floating_point() and part.shape == chosen.shape]
        return Routes(chosen, floats[-1])

    def expert_input(self, expert: int, x_nd: Tensor) -> Tensor:
        """Return the inputs of an expert, from the inputs of the mixture."""
        if expert == self._shared_number:
            return x_nd
        if self.names.scales_inputs:
            gates = torch.sigmoid(linear(x_nd, self.router.weight[expert : expert + 1]).float())
            return x_nd * gates.to(x_nd.dtype)
        return self._norm(x_nd)

    def __getitem__(self, expert: int) -> Expert:
        """Return one expert; the shared expert comes after all others."""
        return SharedExpert(self.shared) if expert == self._shared_number else self.experts[expert]

    def projection_input(self, expert: int, x_nd: Tensor) -> Tensor:
        """Return the inputs of an expert's output projection (n x f), from the inputs of the mixture."""
        with self.stream.layer_products():
            return self[expert].rows(self.expert_input(expert, x_nd)).float()

    def routed(self, expert: int, x_nd: Tensor, routes: Routes) -> tuple[Tensor, Tensor]:
        """Return the tokens routed to an expert, and its gate for each of them (m; m); all for the shared expert."""
        if expert == self._shared_number:
            return torch.arange(len(x_nd), device=x_nd.device), self._shared_gates(x_nd)
        return routes.of(expert)

    def gated_input(self, expert: int, x_nd: Tensor, routes: Routes) -> tuple[Tensor, Tensor]:
        """Return the tokens routed to an expert (m), and the inputs of its output projection times its gate (m x f)."""
        tokens, gates = self.routed(expert, x_nd, routes)
        return tokens, self.projection_input(expert, x_nd[tokens]) * gates[:, None]

    def ungated_output(self, expert: int, x_nd: Tensor) -> Tensor:
        """Return an expert's output with a gate of one (n x d)."""
        with self.stream.layer_products():
            y = self.projection_input(expert, x_nd) @ self[expert].weight
        bias = self[expert].bias
        return y.float() if bias is None else y.float() + bias

    def shared_output(self, x_nd: Tensor) -> Tensor | None:
        """Return the shared expert's output (n x d), where there is one."""
        if self.shared is None:
            return None
        with self.stream.layer_products():
            return self.shared(x_nd[None])[0].float() * self._shared_gates(x_nd)[:, None]

    def _shared_gates(self, x_nd: Tensor) -> Tensor:
        """Return the shared expert's gate for each token (n)."""
        if self.names.shared_expert_gate is None:
            return x_nd.new_ones(len(x_nd))
        with self.stream.layer_products():
            return torch.sigmoid(self.parent.get_submodule(self.names.shared_expert_gate)(x_nd)).float()[:, 0]

    @contextmanager
    def only(self, alive: Tensor) -> Iterator[None]:
        """Let the block run as if only some experts existed."""
        before, self.experts.numbers = self.experts.numbers, alive.tolist()
        try:
            with self._routing_among(alive):
                yield
        finally:
            self.experts.numbers = before

    @contextmanager
    def _routing_among(self, alive: Tensor) -> Iterator[None]:
        """Let the router work as if only some experts existed: the others are cut from copies of its tensors."""
        owners: list[nn.Module] = [self.parent, *self.router.modules()]
        count, before = self.module.units, [(owner, dict(vars(owner))) for owner in owners]
        try:
            for owner in owners if len(alive) < count else ():
                for kind in ("_parameters", "_buffers"):
                    tensors = {
                        name: value
                        if value is None or count not in value.shape
                        else _like(value, value.index_select(value.shape.index(count), alive))
                        for name, value in vars(owner)[kind].items()
                    }
                    vars(owner)[kind] = tensors
                counts = {
                    key: len(alive) for key in axis_kinds()[EXPERTS].total_attributes if vars(owner).get(key) == count
                }
                fewer = {key: min(vars(owner)[key], len(alive)) for key in _TOP_K if key in vars(owner)}
                vars(owner).update(counts | fewer)
            yield
        finally:
            for owner, values in before:
                vars(owner).update(values)


def _like(value: Tensor, part: Tensor) -> Tensor:
    return nn.Parameter(part, requires_grad=False) if isinstance(value, nn.Parameter) else part
