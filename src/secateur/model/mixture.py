"""Mixture of experts of a loaded block, run by the model's own modules: routes of tokens, and outputs of experts.

Shapes: n tokens, d residual width, k experts per token, f channels of an expert.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from secateur.model.axes import Axis, axis_kinds
from secateur.model.expert_matrices import stored_matrix
from secateur.model.stream import BlockStream
from secateur.model.structure import PrunableModule, Slab
from secateur.model.units.channels import CHANNELS
from secateur.model.units.experts import EXPERTS, layout_of, shared_expert

_TOP_K = ("top_k", "num_experts_per_tok")
"""Names that routers have for the number of experts per token."""

_INPUTS, _OUTPUT = {"gate_proj.weight", "up_proj.weight"}, {"down_proj.weight"}
"""Names of an expert's matrices, by the tensor of all experts that holds them."""


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

    def __init__(self, stream: BlockStream, layer: nn.Module, module: PrunableModule, batches: Sequence[int] = ()):
        """Find the experts, the router and the shared expert.

        Args:
            stream: The model.
            layer: The loaded block.
            module: The description of the mixture.
            batches: Number of tokens in each batch of the rows that `gated_input` gets. Each batch takes products of
                its own, as the rounding of a product may depend on its number of rows; by default all tokens are one
                batch.
        """
        assert stream.family.experts is not None
        self.stream, self.module, self.names = stream, module, stream.family.experts
        self.batches = batches
        norms = self.names.parallel_norms
        self.parent: Any = layer if norms else layer.get_submodule(module.output_layer)
        """Module that contains the experts and the router."""
        self._norm: Any = layer.get_submodule(norms[0]) if norms else nn.Identity()
        self.experts: Any = self.parent.get_submodule(self.names.experts)
        self.layout = layout_of(self.experts)
        self.router: Any = self.parent.get_submodule(self.names.router)
        self.shared: Any = shared_expert(self.names, self.parent)
        self._shared_number = module.units
        """Index of the shared expert: one more than the last routed expert."""

    @property
    def shared_name(self) -> str:
        """Name in the block of the shared expert's output projection."""
        return f"{self.module.path}.{self.names.shared_expert}.down_proj.weight"

    def stored_names(self, *, inputs: bool) -> list[str]:
        """Return the names in the block of the experts' output projections, and on request of their input projections.

        Each is one tensor for all experts but the shared one.
        """
        down = self.module.output_projection
        return [down.name, *([f"{down.layer}.{self.names.stored[0][0]}"] if inputs else [])]

    @property
    def all_routed(self) -> Tensor:
        """Indices of all routed experts."""
        return torch.arange(self.module.units, device=self.stream.device)

    def with_shared(self, alive: Tensor) -> list[int]:
        """Return the indices of some experts, after the index of the shared expert if there is one."""
        return [*([] if self.shared is None else [self._shared_number]), *alive.tolist()]

    def route(self, x_nd: Tensor, alive: Tensor) -> Routes:
        """Return the routes of tokens if only some experts exist."""
        with self._only(alive, self.parent, *self.router.modules()), self.stream.layer_products():
            bias = [] if self.names.router_bias is None else [getattr(self.parent, self.names.router_bias)]
            found = self._routes(self.router(x_nd, *bias))
        return Routes(alive[found.experts], found.gates.float())

    def counts(self, tokens: Tensor) -> list[int]:
        """Return how many of some tokens, in ascending order, are in each batch."""
        if not self.batches:
            return [len(tokens)]
        ends = torch.tensor(self.batches, device=tokens.device).cumsum(0)
        return torch.bincount(torch.searchsorted(ends, tokens, right=True), minlength=len(ends)).tolist()

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

    def projection_input(self, expert: int, x_nd: Tensor) -> Tensor:
        """Return the inputs of an expert's output projection (n x f)."""
        if expert == self._shared_number:
            return self._shared_projection_input(x_nd)
        with self.stream.layer_products():
            return self._activated(self._input_projections(expert, x_nd)).float()

    def slopes(self, expert: int, x_nd: Tensor) -> tuple[Tensor, Tensor]:
        """Return the derivatives of `projection_input` by the outputs of the up and gate projections (n x f each)."""
        rows = self._input_projections(expert, x_nd)
        # `_activated` works entry by entry, so that the gradient of the sum is the derivative.
        with torch.inference_mode(False), torch.enable_grad():
            inputs = rows.clone().requires_grad_()
            self._activated(inputs).sum().backward()
        assert inputs.grad is not None
        gate, up = (inputs.grad[:, ::2], inputs.grad[:, 1::2]) if self.layout.in_turn else inputs.grad.chunk(2, dim=1)
        return up, gate

    def _input_projections(self, expert: int, x_nd: Tensor) -> Tensor:
        """Return the outputs of an expert's gate and up projections (n x 2f)."""
        weight, bias = self.experts.gate_up_proj[expert], self._leaf("gate_up_proj_bias", expert)
        return linear(self.expert_input(expert, x_nd), weight.T if self.layout.inputs_first else weight, bias)

    def _activated(self, rows: Tensor) -> Tensor:
        """Return the inputs of the output projection, from the outputs of the input projections."""
        if hasattr(self.experts, "_apply_gate"):
            return cast(Tensor, self.experts._apply_gate(rows))
        gate, up = rows.chunk(2, dim=-1)
        return cast(Tensor, up * self.experts.act_fn(gate))

    def tokens(self, expert: int, routes: Routes) -> Tensor:
        """Return the tokens routed to an expert (m); for the shared expert, all tokens."""
        if expert == self._shared_number:
            return torch.arange(len(routes.experts), device=routes.experts.device)
        return routes.of(expert)[0]

    def gated_input(self, expert: int, x_nd: Tensor, routes: Routes) -> tuple[Tensor, Tensor]:
        """Return the tokens routed to an expert (m), and the inputs of its output projection times its gate (m x f)."""
        is_shared = expert == self._shared_number
        tokens, gates = (self.tokens(expert, routes), None) if is_shared else routes.of(expert)
        parts = x_nd[tokens].split(self.counts(tokens))
        rows_mf = torch.cat([self.projection_input(expert, part) for part in parts])
        gates = torch.cat([self._shared_gates(part) for part in parts]) if gates is None else gates
        return tokens, rows_mf * gates[:, None]

    def weight(self, expert: int) -> Tensor:
        """Return the weight of an expert's output projection (f x d)."""
        if expert == self._shared_number:
            return self.shared.down_proj.weight.data.T
        weight = self.experts.down_proj[expert]
        return weight if self.layout.inputs_first else weight.T

    def feed_forward(self, expert: int) -> PrunableModule:
        """Return one expert described as a feed-forward, with the names of `tensors`."""
        tensors, channels = self.tensors(expert), len(self.weight(expert))
        output = Slab("down_proj.weight", 1, (CHANNELS,), channels, 1)
        # Up first, as everywhere.
        names = (f"{name}.{leaf}" for name in ("up_proj", "gate_proj") for leaf in ("weight", "bias"))
        slabs = (replace(output, name=name, axis=0) for name in names if name in tensors)
        return PrunableModule("channels", (Axis(CHANNELS, channels),), tuple(slabs), output, None, None, None)

    def set_tensors(self, expert: int, tensors: Mapping[str, Tensor]) -> None:
        """Set the values of a routed expert's tensors, by the names of `tensors`."""
        owners = (self.experts.gate_up_proj, self.experts.down_proj)
        matrices = [stored_matrix(owner, expert).clone() for owner in owners]
        views = self._named(expert, *matrices)
        for name, tensor in tensors.items():
            views[name].copy_(tensor)
        for owner, matrix, parts in zip(owners, matrices, (_INPUTS, _OUTPUT), strict=True):
            if tensors.keys() & parts:
                owner[expert] = matrix

    def tensors(self, expert: int) -> dict[str, Tensor]:
        """Return the tensors of one expert, which the caller must not change."""
        if expert == self._shared_number:
            return {name: value.data for name, value in self.shared.named_parameters() if name != "down_proj.bias"}
        matrices = (self.experts.gate_up_proj, self.experts.down_proj)
        return self._named(expert, *(stored_matrix(owner, expert) for owner in matrices))

    def _named(self, expert: int, both: Tensor, down: Tensor) -> dict[str, Tensor]:
        """Return views of a routed expert's matrices and biases, by the names of an ordinary feed-forward.

        Args:
            expert: Number of the expert.
            both: Matrix of the gate and up projections.
            down: Matrix of the output projection.
        """
        layout, f = self.layout, self.module.units_inside
        rows, bias = both.T if layout.inputs_first else both, self._leaf("gate_up_proj_bias", expert)
        parts = [(rows, "weight"), *([] if bias is None else [(bias, "bias")])]
        tensors = {"down_proj.weight": down.T if layout.inputs_first else down}
        for place, name in enumerate(("gate_proj", "up_proj")):
            for value, leaf in parts:
                tensors[f"{name}.{leaf}"] = value[place::2] if layout.in_turn else value[place * f :][:f]
        return tensors

    def ungated_output(self, expert: int, x_nd: Tensor) -> Tensor:
        """Return an expert's output with a gate of one (n x d)."""
        with self.stream.layer_products():
            y = self.projection_input(expert, x_nd) @ self.weight(expert)
        bias = self.bias(expert)
        return y.float() if bias is None else y.float() + bias

    def shared_output(self, x_nd: Tensor) -> Tensor | None:
        """Return the shared expert's output (n x d), where there is one."""
        if self.shared is None:
            return None
        with self.stream.layer_products():
            return self.shared(x_nd[None])[0].float() * self._shared_gates(x_nd)[:, None]

    def _shared_projection_input(self, x_nd: Tensor) -> Tensor:
        """Return the inputs of the shared expert's output projection (n x f)."""
        seen: list[Tensor] = []
        handle = self.shared.down_proj.register_forward_hook(lambda _, args, __: seen.append(args[0]))
        try:
            with self.stream.layer_products():
                self.shared(x_nd[None])
        finally:
            handle.remove()
        return seen[0][0].float()

    def _shared_gates(self, x_nd: Tensor) -> Tensor:
        """Return the shared expert's gate for each token (n)."""
        if self.names.shared_expert_gate is None:
            return x_nd.new_ones(len(x_nd))
        with self.stream.layer_products():
            return torch.sigmoid(self.parent.get_submodule(self.names.shared_expert_gate)(x_nd)).float()[:, 0]

    def bias(self, expert: int) -> Tensor | None:
        """Return the bias of an expert's output projection (d), where it has one."""
        if expert == self._shared_number:
            return self.shared.down_proj.bias
        return self._leaf("down_proj_bias", expert)

    def _leaf(self, name: str, expert: int) -> Tensor | None:
        return getattr(self.experts, name)[expert] if self.layout.biased else None

    def only(self, alive: Tensor) -> AbstractContextManager[None]:
        """Let the block run as if only some experts existed; their tensors are copied."""
        return self._only(alive, self.parent, self.experts, *self.router.modules())

    @contextmanager
    def _only(self, alive: Tensor, *owners: nn.Module) -> Iterator[None]:
        """Let modules work as if only some experts existed: the other experts are cut from the modules' tensors."""
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
