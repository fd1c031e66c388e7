"""Models to measure: opened, and loaded. transformers runs them, or llama.cpp runs a GGUF file that transformers cannot
read."""

import shutil
import tempfile
import weakref
from typing import Any

import torch
from gguf import GGUFReader

from secateur.base.errors import SecateurError
from secateur.base.files import local_path
from secateur.base.memory import parse_memory, rss_bytes
from secateur.base.progress import Silent, Watcher
from secateur.base.quiet import quiet
from secateur.checkpoints.checkpoint import Checkpoint, open_checkpoint
from secateur.gguf.llama_cpp import library
from secateur.measure.llama_cpp import LlamaCppFile, LlamaCppModel
from secateur.model.per_layer import model_class

Model = Checkpoint | LlamaCppFile


def open_to_measure(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Model:
    """Open a model to measure it.

    Raises:
        SecateurError: As `open_checkpoint`, unless the model is a GGUF file and llama.cpp's library is installed.
    """
    try:
        return open_checkpoint(model, revision=revision, trust_remote_code=trust_remote_code)
    except SecateurError as error:
        try:
            file = LlamaCppFile(model)
        except Exception:  # The reader maps the file into memory, and fails in many ways on a broken one.
            raise error from None
        try:
            library()
        except SecateurError as missing:
            raise SecateurError(f"{error}; llama.cpp may be able to run it, but {missing}") from error
        return file


def stored_bytes(model: Model) -> int:
    """Return the number of bytes of a model's tensors in its folder or file."""
    if isinstance(model, Checkpoint) and not model.source.endswith(".gguf"):
        return model.bytes
    reader = model.reader if isinstance(model, LlamaCppFile) else GGUFReader(local_path(model.source))
    return sum(int(tensor.n_bytes) for tensor in reader.tensors)


def load(
    model: Model,
    dtype: torch.dtype,
    device: torch.device,
    *,
    memory: str | None = None,
    whole: bool = False,
    watcher: Watcher | None = None,
) -> Any:
    """Load a model to score it.

    If the model takes more memory than the process may use, its layers stay on disk and are read at every forward.

    Args:
        model: The model. A file that llama.cpp runs is loaded as it is, whatever the other arguments say.
        dtype: Dtype to compute in.
        device: Device to compute on.
        memory: Limit on the memory of the process; see `parse_memory`.
        whole: Whether the whole model is loaded into memory, however large it is.
        watcher: Progress output.

    Raises:
        SecateurError: Weights are missing or of another shape, which transformers would replace by random ones.
    """
    watcher = watcher or Silent()
    if isinstance(model, LlamaCppFile):
        watcher.note(f"{model.source} runs in llama.cpp on the CPU, because transformers cannot read it")
        return LlamaCppModel(model)
    size = model.entries * dtype.itemsize
    offloads = not whole and device.type == "cpu" and size > parse_memory(memory) - rss_bytes()
    options: dict[str, Any] = {}
    if offloads:
        if model.quantised:
            raise SecateurError(
                f"{model.source}: its dequantised weights take {size / 1e9:,.2f} GB of memory, but --memory "
                "leaves less; raise --memory, or evaluate the pruned model"
            )
        watcher.note(f"{model.source} is read from disk as it runs, since it would take {size / 1e9:,.2f} GB of memory")
        # The folder takes weights whose stored form differs from the model's.
        options = {"device_map": {"": "disk"}, "offload_folder": tempfile.mkdtemp(prefix="secateur-")}
    with quiet():
        auto = model_class(model.config, model.multimodal_config)
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        network, info = model.load(auto, dtype, **options)
    _check_complete(model, info)
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
