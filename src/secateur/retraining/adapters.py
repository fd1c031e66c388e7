"""Trained weights: low-rank adapters (LoRA) on the matrices of the blocks, or all weights of the blocks.

W' = W + SCALE * B A        A: rank x inputs, B: outputs x rank
"""

from math import prod
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.families.registry import experts_of, family_of

SCALE = 2
"""Factor of the adapters' product, alpha / rank, as in LLM-Pruner."""


def adapted_layers(network: Any) -> tuple[str, ...]:
    """Return the paths of the linear layers that get adapters: all of them in the blocks, as in LLM-Pruner."""
    prefix, mixture = family_of(network.config).blocks, experts_of(network.config)
    found = ((f"{prefix}.{name}", module) for name, module in network.get_submodule(prefix).named_modules())
    # A router may return more than its product, which an adapter cannot wrap.
    routers = () if mixture is None else (f".{mixture.router}",)
    return tuple(
        name for name, module in found if isinstance(module, nn.Linear | Conv1D) and not name.endswith(routers)
    )


def adapted_experts(network: Any) -> tuple[str, ...]:
    """Return the names of the parameters that hold the experts' matrices, which get adapters as well."""
    if (mixture := experts_of(network.config)) is None:
        return ()
    prefix, leaves = f"{family_of(network.config).blocks}.", dict(mixture.stored)
    ends = tuple(f".{mixture.experts}.{leaf}" for leaf in leaves)
    return tuple(name for name, _ in network.named_parameters() if name.startswith(prefix) and name.endswith(ends))


def trained_parameters(network: Any, rank: int) -> tuple[str, ...]:
    """Return the names of the parameters that a training changes.

    With adapters (rank > 0), these are the matrices into which they are merged; with rank 0, all of the blocks.
    """
    if rank:
        return (*(f"{layer}.weight" for layer in adapted_layers(network)), *adapted_experts(network))
    prefix = f"{family_of(network.config).blocks}."
    return tuple(name for name, _ in network.named_parameters() if name.startswith(prefix))


def entries_trained(network: Any, rank: int) -> int:
    """Return the number of parameters that a training changes: of the adapters, or of the blocks."""
    shapes = [network.get_parameter(name).shape for name in trained_parameters(network, rank)]
    if rank == 0:
        return sum(map(prod, shapes))
    # Each expert's matrix has an adapter of its own.
    return sum(rank * prod(shape[:-2]) * sum(shape[-2:]) for shape in shapes)


def largest_rank(network: Any) -> int:
    """Return the largest rank that a matrix with adapters can have."""
    shapes = [network.get_parameter(name).shape for name in trained_parameters(network, 1)]
    return max(min(shape[-2:]) for shape in shapes)


def with_adapters(network: Any, rank: int) -> Any:
    """Return the network with adapters; with rank 0 the network itself, with gradients for its blocks only."""
    if rank == 0:
        names = set(trained_parameters(network, rank))
        for name, value in network.named_parameters():
            value.requires_grad_(name in names)
        return network
    from peft import LoraConfig, get_peft_model

    layers, experts = adapted_layers(network), adapted_experts(network)
    config = LoraConfig(
        r=rank,
        lora_alpha=SCALE * rank,
        target_modules=list(layers),
        target_parameters=list(experts) or None,
        fan_in_fan_out=isinstance(network.get_submodule(layers[0]), Conv1D),
        task_type="CAUSAL_LM",
    )
    # The network has no weights yet.
    return get_peft_model(network, config, low_cpu_mem_usage=True)


def adapters_of(network: Any) -> dict[str, Any]:
    """Return the adapter of each adapted matrix, by the name that the matrix has without adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    for path, module in network.named_modules():
        if isinstance(module, BaseTunerLayer):
            # Adapters of several matrices of one module are wrapped around each other.
            layer = path.replace(".base_layer", "")
            found[f"{layer}.{getattr(module, 'parameter_name', 'weight')}"] = module
    return found
