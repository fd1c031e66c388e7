"""The weights of a GGUF file that is read here as a folder, block by block.

The model of the file's config says which tensors there must be, and the gguf package's map what llama.cpp calls them.
What one side has and the other has not is refused before anything is read.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import gguf
import torch
from accelerate import init_empty_weights
from gguf import GGUFReader
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from secateur.base.errors import SecateurError
from secateur.families.entry import Experts, Family
from secateur.families.registry import family_of
from secateur.model.facts import head_dim
from secateur.model.gguf_config import known_name
from secateur.model.gguf_file import GgufFile
from secateur.model.gguf_layout import SCALES, adds_one, by_key, decays_back, tiled
from secateur.model.weights import INDEX

Make = Callable[[torch.dtype], Iterator[tuple[str, Tensor]]]
"""What a checkpoint holds of one parameter, by stored names."""


def planned(reader: GGUFReader, dtype: torch.dtype) -> Callable[[Path], None]:
    """What writes the model of a file into a folder, without tokenizer; no weights are read before.

    One block is in memory at a time, and one expert in float32.

    Args:
        dtype: of the weights to write; biases of the choice of experts are float32.

    Raises:
        SecateurError: the file is of another architecture, or says or holds something that has no place in its class.
    """
    file = GgufFile(reader)
    config = file.config()
    return partial(_write, config, _shards(file, config), dtype)


def _write(config: Any, shards: Sequence[Sequence[Make]], dtype: torch.dtype, folder: Path) -> None:
    """Weights, index and config.json, into a folder that is there."""
    places, total = dict[str, str](), 0
    for number, makers in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {stored: value for make in makers for stored, value in make(dtype)}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        total += sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    config.dtype = dtype
    config.save_pretrained(folder)


def _shards(file: GgufFile, config: Any) -> list[list[Make]]:
    """How to make what a checkpoint holds, block by block, and outside of blocks.

    Raises:
        SecateurError: the file lacks something that the model has, has something else, or in another shape.
    """
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    config.architectures = [type(model).__name__]
    family = family_of(config)
    of_block = re.compile(rf"{re.escape(family.blocks)}\.(\d+)\.(.+)")
    shards: list[list[Make]] = [[] for _ in range(file.blocks + 1)]
    used = set[str]()
    for name, parameter in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        match, shape = of_block.fullmatch(name), tuple(parameter.shape)
        if match is None:
            sources, make = _plain(file, config, name, shape)
        elif family.experts and match[2].startswith(_of_experts(family)):
            sources, make = _experts(file, family, name, f"blk.{match[1]}", shape)
        elif family.latent and match[2] == f"{family.attention}.{family.latent[1]}.weight":
            sources, make = _latent(file, config, name, f"blk.{match[1]}", shape)
        elif match[2].endswith(".in_proj_qkvz.weight"):
            sources, make = _of_keys(file, config, name, f"blk.{match[1]}", shape)
        else:
            sources, make = _plain(file, config, name, shape)
        used.update(sources)
        shards[int(match[1]) if match else -1].append(make)
    unused = file.tensors.keys() - used
    if unused:
        raise SecateurError(f"{config.model_type} has no place for {min(unused)}, which is in it")
    return shards


def _plain(file: GgufFile, config: Any, name: str, shape: tuple[int, ...]) -> tuple[list[str], Make]:
    """The tensors of a file that a parameter is made of, and how: here, one."""
    stored = _stored(family_of(config).experts, name)
    source = _in_file(file, stored) or _in_file(file, name)
    if source is None:
        raise SecateurError(f"GGUF has no place for {name}")
    _check(source, file.shape(source), shape)
    undo = _undoing(file, config, name, source)

    def make(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        tensor = file.read(source, torch.float32 if undo else dtype)
        yield stored, (undo(tensor).to(dtype) if undo else tensor).reshape(shape).contiguous()

    return [source], make


def _undoing(file: GgufFile, config: Any, name: str, source: str) -> Callable[[Tensor], Tensor] | None:
    """What gives a parameter, in float32, of what llama.cpp has made of it; None where that is the same."""
    if file.how.pairs and re.search(r"\.attn_[qk]\.", source):
        return partial(_out_of_pairs, half=head_dim(config) // 2)
    if file.family.norm_offset and adds_one(source):
        return lambda values: values - 1
    if file.how.linear is None or ".linear_attn." not in name:
        return None
    leaf = name.partition(".linear_attn.")[2]
    order = tiled(config, back=True).get(leaf) if file.how.linear == "tiled" else None
    if leaf != "A_log":
        return order
    return lambda values: decays_back(order(values) if order else values)


def _out_of_pairs(rows: Tensor, half: int) -> Tensor:
    """Rows of each head, of which neighbours rotate together, as checkpoints have them: half a head apart."""
    return rows.unflatten(0, (-1, half, 2)).transpose(1, 2)


def _of_keys(file: GgufFile, config: Any, name: str, block: str, shape: tuple[int, ...]) -> tuple[list[str], Make]:
    """The same of queries, keys, values and gates of linear attention, which older files hold as checkpoints do."""
    sources = [f"{block}.attn_qkv.weight", f"{block}.attn_gate.weight"]
    if sources[0] not in file.tensors:
        return _plain(file, config, name, shape)
    (rows, inputs), (gates, _) = map(file.shape, sources)
    _check(sources[0], (rows + gates, inputs), shape)

    def make(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        qkv, gates = (file.read(source, dtype) for source in sources)
        yield name, by_key(qkv, gates, config)

    return sources, make


def _latent(file: GgufFile, config: Any, name: str, block: str, shape: tuple[int, ...]) -> tuple[list[str], Make]:
    """The same of what makes keys and values of a latent vector, which older files hold in one tensor."""
    sources = [f"{block}.attn_k_b.weight", f"{block}.attn_v_b.weight"]
    if sources[0] not in file.tensors:
        return _plain(file, config, name, shape)
    (heads, rank, keys), (_, values, _) = map(file.shape, sources)
    _check(sources[0], (heads * (keys + values), rank), shape)

    def make(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        # That of keys is applied to queries, so it is turned.
        of_keys, of_values = (file.read(source, dtype) for source in sources)
        yield name, torch.cat([of_keys.transpose(1, 2), of_values], dim=1).flatten(0, 1)

    return sources, make


def _of_experts(family: Family) -> str:
    """How names of what all experts of a block hold begin, inside it."""
    assert family.experts is not None
    return f"{family.mixture}{family.experts.experts}."


def _experts(file: GgufFile, family: Family, name: str, block: str, shape: tuple[int, ...]) -> tuple[list[str], Make]:
    """The same of a tensor of all experts of a block: matrices, or biases."""
    names = family.experts
    assert names is not None
    owner, _, leaf = name.rpartition(".")
    kind = "bias" if leaf.endswith("_bias") else "weight"
    parts = dict(names.stored)[leaf.removesuffix("_bias")]
    sources = [f"{block}.ffn_{part}_exps.{kind}" for part in (("gate", "up") if len(parts) == 2 else ("down",))]
    if len(parts) == 2 and (fused := f"{block}.ffn_gate_up_exps.{kind}") in file.tensors:
        sources = [fused]
    found = [file.shape(source) for source in sources]
    turned = names.inputs_first and kind == "weight"
    rows = sum(one[1] for one in found)
    _check(sources[0], (found[0][0], rows, *found[0][2:]), (shape[0], *shape[:0:-1]) if turned else shape)

    def pieces(dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
        """Of each expert, its parts."""
        stacks = [file.stack(source, dtype) for source in sources]
        for own in zip(*stacks, strict=True):
            yield own if len(own) == len(parts) else own[0].chunk(len(parts))

    def together(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        whole = torch.empty(shape, dtype=dtype)
        for place, own in zip(whole, pieces(dtype), strict=True):
            joined = torch.stack(own, 1).flatten(0, 1) if names.alternating else torch.cat(own)
            place.copy_(joined.T if turned else joined)
        yield _stored(names, name), whole

    def apart(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        for expert, own in enumerate(pieces(dtype)):
            for part, piece in zip(parts, own, strict=True):
                yield _stored(names, f"{owner}.{expert}.{part}.weight"), piece.clone()

    return sources, together if names.stacked else apart


def _check(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raise `SecateurError` where a tensor has another shape than its parameter; axes of one entry do not count."""
    if [size for size in found if size != 1] != [size for size in wanted if size != 1]:
        raise SecateurError(f"{name} is {list(found)} where {list(wanted)} are wanted")


def _stored(experts: Experts | None, name: str) -> str:
    """What checkpoints call a parameter."""
    for own, stored in experts.renamed if experts else ():
        name = name.replace(own, stored, 1)
    return name


def _in_file(file: GgufFile, name: str) -> str | None:
    """What llama.cpp calls a parameter, or None."""
    for own, known in SCALES.items():
        if name.endswith(f".{own}"):
            return re.sub(r".*\.(\d+)\.[^\d]*$", rf"blk.\1.{known}", name)
    found: str | None = _names(file.architecture, file.blocks).get_name(known_name(name), (".weight", ".bias"))
    return found


@cache
def _names(architecture: str, blocks: int) -> Any:
    """The gguf package's map from checkpoints' names to llama.cpp's."""
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(number, blocks)
