"""Reading of a mixture of experts: router, experts, shared expert, and the config keys of their numbers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.checkpoints.conversions import matrices_of_experts
from secateur.families.family import Experts
from secateur.layout.keys import OTHER, Keys, factor_key
from secateur.layout.probe import BlockProbe, is_matrix, same

STORED: Mapping[str, int] = {"gate_up_proj": 2, "down_proj": 1}
"""Tensors of a module of experts that can be pruned, and the number of matrices of each expert in them."""


def experts_in(module: nn.Module) -> str | None:
    """Return the path inside a module of the submodule with the matrices of all experts; None without experts."""
    for path, part in module.named_modules():
        # A convolution has one matrix for each position of its kernel.
        if any(p.dim() == 3 for p in part.parameters(recurse=False)) and not isinstance(part, nn.Conv1d):
            return path
    return None


def read_mixture(probe: BlockProbe, path: str, keys: Keys) -> Experts | str:
    """Return the description of a mixture at a path; or why it cannot be pruned."""
    mixture: Any = probe.block.get_submodule(path)
    name = experts_in(mixture)
    experts = mixture.get_submodule(name or "")
    shapes = {leaf: value for leaf, value in experts.named_parameters(recurse=False) if value.dim() == 3}
    if not name or shapes.keys() != STORED.keys():
        return "its experts are not a gate, an up and a down matrix each"
    number, inside = len(shapes["down_proj"]), f"{path}.{name}"
    width = int(shapes["down_proj"].shape[1 if getattr(experts, "is_transposed", False) else 2])
    router, shared, shared_gate = _router(mixture, name, number), _shared(mixture), _gate_of_shared(mixture)
    if router is None or f"{path}.{router}" not in probe.calls:
        return "its router is no module of its own"
    routed = probe.calls[f"{path}.{router}"]
    parts = [part for part in routed.output if isinstance(part, Tensor)] if isinstance(routed.output, tuple) else []
    chosen = next((part for part in parts if not part.is_floating_point()), None)
    gates = [part for part in parts if chosen is not None and part.is_floating_point() and part.shape == chosen.shape]
    call = probe.calls[inside]
    given = [*call.args, *call.kwargs.values()]
    if chosen is None or not gates or len(given) < 3 or not torch.equal(given[1], chosen):
        return "its router does not return the experts of each token"
    if not same(given[0], probe.input(path)) or not same(given[2], gates[-1]):
        return "its experts do not have the inputs of their router"
    total = probe.output(inside).clone().flatten()
    if shared is not None:
        gate = torch.sigmoid(probe.output(f"{path}.{shared_gate}")) if shared_gate else torch.ones(1)
        total = total + (gate.reshape(-1, 1) * probe.output(f"{path}.{shared}").flatten(0, -2)).flatten()
    routed_sum = probe.output(inside).flatten()
    factor = float((probe.output(path).flatten() - total + routed_sum) @ routed_sum / (routed_sum @ routed_sum))
    scale = factor_key(keys.config, factor)
    if scale == OTHER or not same(total + (factor - 1) * routed_sum, probe.output(path)):
        return "its output is not the sum of its experts' outputs"
    sizes = keys.shapes(f"{path}.{name}.down_proj")
    number_key = keys.naming(number, lambda variant: variant(sizes)[0] != number)
    width_key = keys.naming(width, lambda variant: width not in variant(sizes)[1:])
    per_token = int(chosen.shape[-1])
    top_k = keys.numbers(path, "top_k", "num_experts_per_tok")
    top_k_key = keys.naming(per_token, lambda variant: per_token not in variant(top_k))
    if number_key is None or width_key is None or top_k_key is None:
        return "its config has no keys for the number of experts, for their width or for the experts per token"
    fields: dict[str, Any] = {}
    if shared is not None:
        down = keys.shapes(f"{path}.{shared}.down_proj.weight")
        before = keys.of_twin(down)
        follows = keys.changed(width_key)(down) != before
        fields |= {"shared_expert": shared, "shared_expert_gate": shared_gate}
        if not follows:
            own = keys.naming(int(before[1]), lambda variant: variant(down) != before)
            fields["shared_expert_width"] = own or "shared_expert_intermediate_size"
    own_tensors = [*mixture.named_parameters(recurse=False), *mixture.named_buffers(recurse=False)]
    bias = [leaf for leaf, value in own_tensors if any(same(value, one) for one in routed.args[1:])]
    groups, stored = ("n_group", "topk_group"), matrices_of_experts(keys.config.model_type)
    if stored.keys() >= STORED.keys():
        fields["stored"] = tuple((leaf, stored[leaf]) for leaf in STORED)
    else:
        fields |= {"stacked": True, "alternating": not getattr(experts, "is_concatenated", True)}
    return Experts(
        experts=name,
        router=router,
        router_bias=bias[0] if bias else None,
        batched_router=routed.args[0].dim() == 3,
        scale=scale,
        number=number_key,
        experts_per_token=top_k_key,
        expert_width=width_key,
        groups=groups if all(isinstance(getattr(keys.config, key, None), int) for key in groups) else None,
        inputs_first=bool(getattr(experts, "is_transposed", False)),
        returns_scores=isinstance(probe.calls[path].output, tuple),
        **fields,
    )


def _router(mixture: nn.Module, experts: str, number: int) -> str | None:
    """Return the child of a mixture, besides the experts, with a matrix that has a row for each expert."""
    for name, child in mixture.named_children():
        if name != experts and any(p.dim() == 2 and len(p) == number for p in child.parameters()):
            return name
    return None


def _shared(mixture: nn.Module) -> str | None:
    """Return the child of a mixture that is a dense feed-forward of three layers."""
    layers = {"gate_proj", "up_proj", "down_proj"}
    for name, child in mixture.named_children():
        if layers <= {path for path, part in child.named_children() if is_matrix(part)}:
            return name
    return None


def _gate_of_shared(mixture: nn.Module) -> str | None:
    """Return the child of a mixture that is a layer with one output."""
    return next((name for name, child in mixture.named_children() if is_matrix(child) and _rows(child) == 1), None)


def _rows(layer: Any) -> int:
    return len(layer.weight)
