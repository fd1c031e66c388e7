"""A transformers model in memory as a checkpoint, whose tensors are read from the model itself."""

from pathlib import Path
from typing import Any

from secateur.base.errors import SecateurError
from secateur.base.quiet import quiet
from secateur.checkpoints.checkpoint import Checkpoint, common_dtype, described, tied_weights
from secateur.checkpoints.config_file import load_config, read_config
from secateur.checkpoints.weights import InMemory, TensorInfo


def checkpoint_in_memory(model: Any, tokenizer: Any, folder: Path) -> Checkpoint:
    """Return the checkpoint of a model in memory.

    Args:
        model: A causal language model of transformers, on any device.
        tokenizer: Its tokenizer; None if it has none.
        folder: An empty folder for config.json and the tokenizer, which must exist as long as the checkpoint is used.

    Raises:
        SecateurError: The object is no such model, or its weights are quantised, adapted or not in memory.
    """
    check_in_memory(model)
    with quiet():
        model.config.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            # `save_pretrained` refuses settings that contradict each other, which do not matter here.
            model.generation_config.to_json_file(folder / "generation_config.json")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    source, raw = model.config.name_or_path or type(model).__name__, read_config(folder)
    tied = tied_weights(model)
    tensors: dict[str, TensorInfo] = {
        name: InMemory(tuple(value.shape), value.dtype, values=value)
        for name, value in model.state_dict().items()
        if name not in tied
    }
    return Checkpoint(
        source=source,
        path=folder,
        side_folder=folder,
        **described(raw, load_config(folder, raw, trust_remote_code=False)),
        dtype=common_dtype(source, tensors),
        tensors=tensors,
    )


def check_in_memory(model: Any) -> None:
    """Check that an object is a model whose weights can be read.

    Raises:
        SecateurError: It is not.
    """
    name = type(model).__name__
    if not all(hasattr(model, attribute) for attribute in ("config", "state_dict", "generate")):
        raise SecateurError(
            f"{name} is not a language model that writes text; pass what AutoModelForCausalLM.from_pretrained returned"
        )
    if hasattr(model, "_orig_mod"):
        raise SecateurError(f"{name} is a compiled model; pass the model that torch.compile was called with")
    if hasattr(model, "peft_config"):
        raise SecateurError(f"{name} has adapters; call merge_and_unload() first")
    if getattr(model, "hf_quantizer", None) is not None:
        raise SecateurError(f"{name} is quantised; load it without quantization_config")
    parameters = model.state_dict(keep_vars=True)
    for key, source in tied_weights(model).items():
        if parameters.get(key) is not parameters.get(source):
            raise SecateurError(
                f"{name}: {key} is another tensor than {source}, but the config ties them; set "
                "config.tie_word_embeddings to False, save the model, and load it again"
            )
    absent = [key for key, value in parameters.items() if value.device.type == "meta"]
    if absent:
        raise SecateurError(f"{name}: {absent[0]} is not in memory; load the model without offloading")
