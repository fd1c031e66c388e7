"""Models loaded through transformers to be scored."""

import shutil
import tempfile
import weakref
from typing import Any

import torch

from secateur.base.errors import SecateurError
from secateur.base.memory import parse_memory, rss_bytes
from secateur.base.progress import Watcher
from secateur.base.quiet import quiet
from secateur.checkpoints.checkpoint import Checkpoint
from secateur.model.per_layer import model_class


def load(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    *,
    memory: str | None = None,
    whole: bool = False,
    watcher: Watcher | None = None,
) -> Any:
    """Load a model through transformers.

    If the model takes more memory than the process may use, its layers stay on disk and are read at every forward.

    Args:
        checkpoint: The model.
        dtype: Dtype to compute in.
        device: Device to compute on.
        memory: Limit on the memory of the process; see `parse_memory`.
        whole: Whether the whole model is loaded into memory, however large it is.
        watcher: Progress output.

    Raises:
        SecateurError: Weights are missing or of another shape, which transformers would replace by random ones.
    """
    size = checkpoint.entries * dtype.itemsize
    offloads = not whole and device.type == "cpu" and size > parse_memory(memory) - rss_bytes()
    options: dict[str, Any] = {}
    if offloads:
        if checkpoint.quantised:
            raise SecateurError(
                f"{checkpoint.source}: its dequantised weights take {size / 1e9:,.2f} GB of memory, but --memory "
                "leaves less; raise --memory, or evaluate the pruned model"
            )
        if watcher is not None:
            watcher.note(
                f"{checkpoint.source} is read from disk as it runs, since it would take {size / 1e9:,.2f} GB of memory"
            )
        # The folder takes weights whose stored form differs from the model's.
        options = {"device_map": {"": "disk"}, "offload_folder": tempfile.mkdtemp(prefix="secateur-")}
    with quiet():
        auto = model_class(checkpoint.config, checkpoint.multimodal_config)
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        network, info = checkpoint.load(auto, dtype, **options)
    _check_complete(checkpoint, info)
    if offloads:
        weakref.finalize(network, shutil.rmtree, options["offload_folder"], ignore_errors=True)
        return network.eval()
    return network.eval().to(device)


def _check_complete(checkpoint: Checkpoint, info: dict[str, Any]) -> None:
    """Raise `SecateurError` if transformers found weights missing, or of another shape than the model's."""
    if info["missing_keys"]:
        raise checkpoint.missing_weights_error(sorted(info["missing_keys"]))
    if info["mismatched_keys"]:
        name, stored, expected = sorted(info["mismatched_keys"])[0]
        raise SecateurError(
            f"{checkpoint.source}: {name} is {list(stored)}, but config.json makes it {list(expected)}; find the "
            "config.json of these weights"
        )
