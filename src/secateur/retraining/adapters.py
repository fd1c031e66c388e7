"""What a retraining changes: low-rank adapters (LoRA) on the matrices of the blocks, or all weights of the blocks."""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.families.registry import experts_of, family_of

SCALE = 2
"""Factor of the adapters' product, alpha / r, as in LLM-Pruner."""
DROPOUT = 0.05
"""Share of an adapter's inputs that a step leaves out, as in LLM-Pruner; zero where there are experts."""


def adapted_layers(network: Any) -> tuple[str, ...]:
    """Return the paths of the layers that get adapters: every matrix of the blocks, as in LLM-Pruner."""
    prefix, mixture = family_of(network.config).blocks, experts_of(network.config)
    found = ((f"{prefix}.{name}", module) for name, module in network.get_submodule(prefix).named_modules())
    # A router may be a layer that gives more than its product.
    routers = () if mixture is None else (f".{mixture.router}",)
    return tuple(
        name for name, module in found if isinstance(module, nn.Linear | Conv1D) and not name.endswith(routers)
    )


def adapted_experts(network: Any) -> tuple[str, ...]:
    """Return the names of the parameters that hold matrices of experts, which get adapters too."""
    if (mixture := experts_of(network.config)) is None:
        return ()
    prefix, leaves = f"{family_of(network.config).blocks}.", dict(mixture.stored)
    ends = tuple(f".{mixture.experts}.{leaf}" for leaf in leaves)
    return tuple(name for name, _ in network.named_parameters() if name.startswith(prefix) and name.endswith(ends))


def trained(network: Any, rank: int) -> tuple[str, ...]:
    """Return the names of the parameters that change: those that adapters are merged into, or all of the blocks."""
    if rank:
        return (*(f"{layer}.weight" for layer in adapted_layers(network)), *adapted_experts(network))
    prefix = f"{family_of(network.config).blocks}."
    return tuple(name for name, _ in network.named_parameters() if name.startswith(prefix))


def adapted(network: Any, rank: int) -> Any:
    """Return the network with adapters, or with rank 0 the network itself, of which the blocks alone are trained."""
    if rank == 0:
        wanted = set(trained(network, rank))
        for name, value in network.named_parameters():
            value.requires_grad_(name in wanted)
        return network
    from peft import LoraConfig, get_peft_model

    layers, experts = adapted_layers(network), adapted_experts(network)
    config = LoraConfig(
        r=rank,
        lora_alpha=SCALE * rank,
        # peft cannot drop inputs of experts.
        lora_dropout=0.0 if experts else DROPOUT,
        target_modules=list(layers),
        target_parameters=list(experts) or None,
        fan_in_fan_out=isinstance(network.get_submodule(layers[0]), Conv1D),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(network, config)
