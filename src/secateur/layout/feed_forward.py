"""Reading of a dense feed-forward: the layers whose row j feeds channel j."""

from typing import Any

import torch
from torch import Tensor

from secateur.layout.attention import output_of
from secateur.layout.probe import BlockProbe, first, same


def read_feed_forward(probe: BlockProbe, path: str | None, down: str | None = None) -> dict[str, Any] | None:
    """Return the fields of a feed-forward in the model's layout; None if no row feeds one channel alone.

    Args:
        probe: The block.
        path: Path of the submodule; None if its layers are children of the block itself.
        down: Path of the output projection inside the block; the last layer of the submodule by default.
    """
    down = down or output_of(probe, str(path))
    if down is None:
        return None
    prefix = "" if path is None else f"{path}."
    feeds = {layer: one.any for layer, one in probe.feeds(down, every_token=True).items() if layer.startswith(prefix)}
    channels = probe.input(down).shape[-1]
    diagonal = torch.eye(channels, dtype=torch.bool)
    fields: dict[str, Any] = {"feed_forward": path, "down": down.removeprefix(prefix), "gate": None}
    own = {layer.removeprefix(prefix): rows for layer, rows in feeds.items()}
    if len(own) == 1 and _are(next(iter(own.values())), torch.cat([diagonal] * 2, 1)):
        fused = next(iter(own))
        if not _is_linear_in(probe, prefix + fused, down, slice(channels, None)):
            return None
        return fields | {"fused_gate": fused} | _activation(probe, path, [probe.output(prefix + fused)[..., :channels]])
    if not own or len(own) > 2 or any(not _are(rows, diagonal) for rows in own.values()):
        return None
    if len(own) == 1:
        up = next(iter(own))
        return fields | {"up": up} | _activation(probe, path, [probe.output(prefix + up)])
    linear = [name for name in own if _is_linear_in(probe, prefix + name, down, slice(None))]
    if not linear:
        return None
    up = linear[-1]
    gate = next(name for name in own if name != up)
    return fields | {"up": up, "gate": gate} | _activation(probe, path, [probe.output(prefix + gate)])


def _are(rows: Tensor, wanted: Tensor) -> bool:
    """Return whether rows feed the wanted channels and no others. Some may be silent for all recorded tokens (ReLU)."""
    if rows.shape != wanted.shape or bool((rows & ~wanted).any()):
        return False
    return bool((rows & wanted).sum() > 0.2 * wanted.sum())


def _is_linear_in(probe: BlockProbe, layer: str, down: str, part: slice) -> bool:
    """Return whether the channels double if some outputs of a layer double."""
    inputs: list[Tensor] = []

    def double(_: Any, __: Any, output: Tensor) -> Tensor:
        scaled = output.clone()
        scaled[..., part] *= 2
        return scaled

    def keep(_: Any, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])

    hooks = [
        probe.block.get_submodule(layer).register_forward_hook(double),
        probe.block.get_submodule(down).register_forward_pre_hook(keep),
    ]
    with torch.no_grad():
        probe.run()
    for hook in hooks:
        hook.remove()
    return same(inputs[0], probe.input(down) * 2)


def _activation(probe: BlockProbe, path: str | None, inputs: list[Any]) -> dict[str, Any]:
    """Return the submodule that computes the activation, if it is one."""
    prefix = "" if path is None else f"{path}."
    for name, call in probe.calls.items():
        is_layer = name in probe.layers or [*probe.block.get_submodule(name).children()]
        is_inside = name.startswith(prefix) and not is_layer and call.args and isinstance(first(call.output), Tensor)
        if is_inside and any(same(call.args[0], one) for one in inputs):
            return {"activation": name.removeprefix(prefix)}
    return {}
