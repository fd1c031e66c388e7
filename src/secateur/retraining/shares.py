"""Weights of the trained model: loaded block by block, and divided among the processes of a run by torch's FSDP2.

Each process has a share of every tensor of the blocks, with its gradient and moments. A block is whole while it runs.
What is outside of the blocks is whole in every process, because it is not trained: embedding, final norm and output
layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from secateur.base.device import to_device
from secateur.base.processes import Processes
from secateur.checkpoints.checkpoint import Checkpoint
from secateur.model.stream import fill
from secateur.model.surgery import assign

ADAPTER = ".lora_"
"""Part of the names of adapters."""
BASE = ".base_layer"
"""Part that adapters insert into the names of the weights that they wrap."""


def load_shares(
    network: Any, blocks: str, checkpoint: Checkpoint, products: torch.dtype, device: torch.device, processes: Processes
) -> None:
    """Load a model that has no weights yet, and divide its blocks among processes.

    Args:
        network: The model, with adapters or without; weights that are trained get the dtype that they have here.
        blocks: Path of its list of blocks.
        checkpoint: Its weights.
        products: Dtype of matrices that are not trained; all else is float32.
        device: Device of the weights.
        processes: The processes.
    """
    mesh = None if processes.is_single else init_device_mesh(device.type, (processes.size,))
    outside = [name for name in network.state_dict() if not name.startswith(f"{blocks}.")]
    fill(network, checkpoint, outside, lambda name: _read(checkpoint, name, products, device))
    undivided = set(network.parameters()) - set(network.get_submodule(blocks).parameters())
    for index, layer in enumerate(network.get_submodule(blocks).children()):
        _fill_block(layer, f"{blocks}.{index}.", checkpoint, products, device)
        _divide_block(layer, mesh, products)
    network.to(device)
    _divide(network.get_submodule(blocks.rpartition(".")[0]), mesh, ignored_params=undivided)


def _fill_block(
    layer: nn.Module, prefix: str, checkpoint: Checkpoint, products: torch.dtype, device: torch.device
) -> None:
    """Load a block, and give its adapters their first values."""
    for name, value in layer.state_dict(keep_vars=True).items():
        if ADAPTER in name:
            filled = torch.empty_like(value, device=device)
        else:
            own = prefix + name.replace(BASE, "")
            filled = _read(checkpoint, own, torch.float32 if value.requires_grad else products, device)
            filled = filled.to(value.dtype) if value.requires_grad else filled
        assign(layer, name, filled)
        if value.requires_grad:
            layer.get_parameter(name).requires_grad_()
    for module in layer.modules():
        start: Any = getattr(module, "reset_lora_parameters", None)
        if start is not None:
            start("default", True)
    layer.to(device)


def _read(checkpoint: Checkpoint, name: str, products: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor on a device, matrices in the dtype of products."""
    value = to_device(checkpoint.parameter(name).read(), device)
    dtype = products if value.dim() > 1 else torch.float32
    return value.to(dtype) if value.is_floating_point() else value


def _divide_block(layer: nn.Module, mesh: DeviceMesh | None, products: torch.dtype) -> None:
    """Divide a block. If all of it is trained, its matrices are sent in the dtype of products, because autocast would
    keep copies of all blocks; modules such as norms, which have vectors alone, are sent in float32."""
    is_trained = all(value.requires_grad for value in layer.parameters())
    for module in layer.modules():
        own = [*module.parameters(recurse=False)]
        if is_trained and own and all(value.dim() < 2 for value in own):
            _divide(module, mesh)
    _divide(layer, mesh, products if is_trained else None)


def _divide(module: nn.Module, mesh: DeviceMesh | None, sent: torch.dtype | None = None, **options: Any) -> None:
    """Divide a module among processes, which send weights in a dtype; gradients are added up in float32."""
    if mesh is not None and not isinstance(module, FSDPModule):
        policy = MixedPrecisionPolicy(sent, torch.float32, cast_forward_inputs=False)
        fully_shard(module, mesh=mesh, mp_policy=policy, **options)


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Gather the weights of a block in every process; changes to them are lost on exit."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def gathered(value: Tensor) -> Tensor:
    """Return a tensor that may be divided among processes, in every process."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def set_share(value: Tensor, whole: Tensor) -> None:
    """Set the entries of a tensor that may be divided among processes from the whole tensor."""
    if not isinstance(value, DTensor):
        value.copy_(whole)
        return
    shares, rank = whole.chunk(value.device_mesh.size()), value.device_mesh.get_rank()
    if rank < len(shares):
        share_of(value).copy_(shares[rank])


def share_of(value: Any) -> Tensor:
    """Return this process's share of a tensor that may be divided among processes."""
    share: Tensor = value.to_local() if isinstance(value, DTensor) else value.detach()
    return share
