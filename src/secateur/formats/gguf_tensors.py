"""The tensors of a GGUF file: described first and made when they are written, so that one is in memory at a time.

Letters of shapes: d residual width, h entries per head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor
from torch.nn import functional
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from secateur.base.errors import SecateurError
from secateur.formats.gguf_architecture import Architecture
from secateur.formats.gguf_architectures import QKV
from secateur.formats.gguf_choice import in_file
from secateur.formats.gguf_model import GgufModel
from secateur.formats.gguf_types import TYPES
from secateur.model.axes import Width
from secateur.model.gguf_config import known_name
from secateur.model.gguf_layout import SCALES, STILL, adds_one, by_kind, decays, tiled
from secateur.model.units.heads import HEADS


@dataclass(frozen=True)
class Lazy:
    """A tensor to be made when it is written; its shape is known before."""

    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    def then(self, change: Callable[[Tensor], Tensor]) -> Lazy:
        """The tensor after a change; what shape that gives is tried on a tensor without data."""
        shape = change(torch.empty(self.shape, device="meta")).shape
        return Lazy(tuple(shape), lambda: change(self.make()))

    def rows(self, start: int, stop: int) -> Lazy:
        """Some of the rows."""
        return self.then(lambda tensor: tensor[start:stop])

    @staticmethod
    def stack(parts: Sequence[Lazy]) -> Lazy:
        """Rows of several, one after the other."""
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        return Lazy(shape, lambda: torch.cat([part.make() for part in parts]))

    @staticmethod
    def of(tensor: Tensor) -> Lazy:
        """One that is there already."""
        return Lazy(tuple(tensor.shape), lambda: tensor)

    @staticmethod
    def full(shape: tuple[int, ...], value: float) -> Lazy:
        """The same number everywhere."""
        return Lazy(shape, lambda: torch.full(shape, value))


@dataclass(frozen=True)
class Entry:
    """One tensor of the file."""

    name: str
    tensor: Lazy
    type: GGMLQuantizationType

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.tensor.shape)) // block * size

    def data(self) -> np.ndarray[Any, Any]:
        """The bytes to write.

        Raises:
            SecateurError: a weight is too large for the type.
        """
        values = self.tensor.make().to(torch.float32).contiguous().numpy()
        with np.errstate(over="ignore"):
            data: np.ndarray[Any, Any] = gguf.quants.quantize(values, self.type)
        if self.type == GGMLQuantizationType.F16 and not np.isfinite(data).all():
            raise SecateurError(f"tensor {self.name} has weights beyond what f16 holds; use bf16 or f32")
        return data


def laid_out(model: GgufModel, architecture: Architecture, type: str) -> list[Width]:
    """The widths in the file: channels fill up rows, and a block that cannot be empty has units that add nothing."""
    result = []
    for index, width in enumerate(model.widths):
        biased = "attn_output" in model.added_biases or f"{model.layers['attn_output']}.bias" in model.inside[index]
        # The first block tells llama.cpp how large heads are.
        least = int(not architecture.headless or index == 0 or biased)
        heads = width | {name: width[name] or least for name in HEADS}
        result.append(in_file(heads, type))
    return result


def entries(model: GgufModel, architecture: Architecture, type: str) -> list[Entry]:
    """Every tensor of the file, in its order.

    Raises:
        SecateurError: a stored tensor is missing, has another shape than the config says, or has no place.
    """
    whole = [Entry(name, lazy, _type(name, lazy.shape, type)) for name, lazy in _whole(model, architecture).items()]
    return whole + [e for index in range(len(model.widths)) for e in block_entries(model, architecture, index, type)]


def block_entries(model: GgufModel, architecture: Architecture, index: int, type: str) -> list[Entry]:
    """The tensors of one block; raises what `entries` does."""
    width = laid_out(model, architecture, type)[index]
    named = _block(model, architecture, index, width).items()
    return [Entry(f"blk.{index}.{name}", lazy, _type(name, lazy.shape, type)) for name, lazy in named]


def bytes_at(entry: Entry, shape: tuple[int, ...], type: str) -> int:
    """What a tensor of a block would take if it had another shape."""
    return replace(entry, tensor=Lazy.full(shape, 0.0), type=_type(entry.name.split(".", 2)[2], shape, type)).bytes


def _type(name: str, shape: tuple[int, ...], file: str) -> GGMLQuantizationType:
    """The type of one tensor: vectors stay as they are, rows that do not divide fall back on f16."""
    storage = TYPES[file]
    exact = ("position_embd.weight", "ffn_gate_inp.weight", "shortconv.conv.weight", "ssm_conv1d.weight")
    if len(shape) == 1 or name in exact or name.endswith("_norm.weight"):
        return GGMLQuantizationType.F32
    if shape[-1] % storage.multiple:
        return GGMLQuantizationType.F16
    ends = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")
    return storage.ends if name in ends else storage.matrices


@lru_cache
def _names(architecture: str, blocks: int) -> Any:
    """The gguf package's map from transformers' names to llama.cpp's."""
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(number, blocks)


def _renamed(model: GgufModel, architecture: Architecture, stored: str) -> str:
    """llama.cpp's name of a tensor."""
    names = _names(architecture.name, len(model.widths))
    # Bloom's stand there without what they are part of.
    tried = (names.get_name(name, (".weight", ".bias")) for name in (stored, stored.removeprefix("transformer.")))
    found = next(filter(None, tried), None)
    if found is None:
        raise SecateurError(
            f"{model.checkpoint.source}: GGUF has no place for tensor {stored}; "
            "remove it if the model does not need it, or keep the safetensors folder"
        )
    return str(found)


def _stored(model: GgufModel, name: str) -> Lazy:
    return Lazy(model.checkpoint.tensors[name].shape, partial(model.checkpoint.read, name))


def _whole(model: GgufModel, architecture: Architecture) -> dict[str, Lazy]:
    """Tensors that belong to no block."""
    tied = bool(model.config.tie_word_embeddings)
    found = {_renamed(model, architecture, name): _stored(model, stored) for name, stored in model.outside.items()}
    for name in ("token_embd.weight", architecture.final_norm, None if tied else "output.weight"):
        if name is not None and name not in found:
            raise SecateurError(f"{model.checkpoint.source}: no tensor for {name} among the weights; restore it")
    if tied:
        found.pop("output.weight", None)
        if architecture.output == "stored":
            found["output.weight"] = found["token_embd.weight"]
    found = {name: _norm(model, name, lazy) for name, lazy in found.items()}
    # By how much each frequency is divided, where that is not a formula of llama.cpp's.
    if model.kind == "longrope":
        for length in ("long", "short"):
            factors = torch.tensor(model.rope[f"{length}_factor"], dtype=torch.float32)
            found[f"rope_factors_{length}.weight"] = Lazy.of(factors)
    if model.kind == "proportional":
        half = model.heads_of(model.config.layer_types.index("full_attention"))[0] // 2
        factors = torch.full((half,), STILL)
        factors[: int(half * model.rope.get("partial_rotary_factor", 1.0))] = model.rope.get("factor", 1.0)
        found["rope_freqs.weight"] = Lazy.of(factors)
    if model.kind == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
        plain = model.rope["rope_theta"] ** -(torch.arange(0, model.dim, 2, dtype=torch.float32) / model.dim)
        found["rope_freqs.weight"] = Lazy.of(plain / scaled)
    return found


def _block(model: GgufModel, architecture: Architecture, index: int, width: Width) -> dict[str, Lazy]:
    """The tensors of a block by llama.cpp's names inside a block, at the width that it has in the file."""
    parts = _parts(model, index)
    used = {f"{name}.{leaf}" for name in model.layers.values() for leaf in ("weight", "bias")}
    experts, pieces = _experts(model, index)
    parts |= experts | _latent(model, index)
    if model.family.latent is not None:
        used.add(f"{model.family.attention}.{model.family.latent[1]}.weight")
    others = {
        name: _stored(model, stored)
        for name, stored in model.inside[index].items()
        if name not in used and stored not in pieces and ".act_fn." not in name
    }
    if architecture.linear and model.mixes(index):
        others = _linear(model, architecture, others)
    for name, lazy in others.items():
        known = known_name(name)
        renamed = SCALES.get(known) or _renamed(model, architecture, f"{model.family.blocks}.{index}.{known}")
        normed = _norm(model, renamed, lazy)
        # A convolution of one channel each.
        one = renamed.endswith(("conv.weight", "conv1d.weight"))
        parts[renamed.removeprefix(f"blk.{index}.")] = normed.then(partial(torch.squeeze, dim=1)) if one else normed
    if model.widths[index].heads:
        _rescale(parts, 1.0 if architecture.score_ratio is None else architecture.score_ratio(model, index))
    elif width.heads:
        parts |= _idle_head(model, architecture)
    else:
        parts = {name: lazy for name, lazy in parts.items() if not name.startswith("attn_")}
    if not width.experts:
        _fill(parts, width.channels, model)
    if architecture.needs_biases:
        for layer in model.layers:
            parts.setdefault(f"{layer}.bias", Lazy.full(parts[f"{layer}.weight"].shape[:1], 0.0))
    if architecture.pairs and not model.source.pairs:
        for name in ("attn_q.weight", "attn_q.bias", "attn_k.weight", "attn_k.bias"):
            if name in parts:
                parts[name] = parts[name].then(partial(_in_pairs, dim=model.dim))
    if architecture.fused_qkv:
        _fuse(parts, ("attn_q", "attn_k", "attn_v"), "attn_qkv")
    if architecture.fused_gate:
        _fuse(parts, ("ffn_gate", "ffn_up"), "ffn_up")
    return parts


def _parts(model: GgufModel, index: int) -> dict[str, Lazy]:
    """The layers that pruning cuts, one by one where they are stored fused, as outputs x inputs.

    Raises:
        SecateurError: one is missing, or has another shape than the width in the config.
    """
    width, family, hidden = model.widths[index], model.family, model.config.hidden_size
    mixed = family.heads_by_layer_type
    dim, groups = model.heads_of(index) if mixed and width.heads else (model.dim, width.groups)
    rows, shared, channels = width.heads * dim, groups * dim, model.fed(width)
    outputs = {
        "attn_q": rows * (2 if model.source.query_gate else 1),
        "attn_k": shared,
        "attn_v": shared,
        "ffn_gate": channels,
        "ffn_up": channels,
    }
    shapes = {layer: (count, hidden) for layer, count in outputs.items()}
    shapes |= {
        "attn_output": (hidden, width.heads * (dim if mixed else model.value_dim)),
        "ffn_down": (hidden, channels),
    }
    starts = {"attn_q": 0, "attn_k": rows, "attn_v": rows + shared, "ffn_gate": 0, "ffn_up": channels}
    parts: dict[str, Lazy] = {}
    here = {layer: name for layer, name in model.layers.items() if layer[:4] == "ffn_" or not model.mixes(index)}
    for layer, name in here.items():
        for leaf in ("weight", "bias") if layer.startswith("attn") or mixed or not width.experts else ():
            shape = shapes[layer][: 2 if leaf == "weight" else 1]
            stored = model.inside[index].get(f"{name}.{leaf}")
            if stored is None:
                # The last blocks may have no keys and values, and values may be keys.
                if leaf == "weight" and 0 not in shape and not (mixed and layer in ("attn_k", "attn_v")):
                    raise SecateurError(f"{model.checkpoint.source}: block {index} has no {name}.weight; restore it")
                continue
            lazy = _stored(model, stored)
            if model.source.transposed and leaf == "weight":
                lazy = lazy.then(torch.t)
            if model.fused and model.fused[1] and layer in QKV:
                lazy = lazy.then(partial(_of_groups, which=layer[-1], groups=width.groups, dim=dim))
            elif (model.fused and layer in QKV) or (family.fused_gate and layer in ("ffn_gate", "ffn_up")):
                lazy = lazy.rows(starts[layer], starts[layer] + shape[0])
            if lazy.shape != shape:
                raise SecateurError(
                    f"{model.checkpoint.source}: {stored} gives {list(lazy.shape)} for {layer} where config.json makes "
                    f"it {list(shape)}; find the config.json of these weights"
                )
            parts[f"{layer}.{leaf}"] = lazy
    return parts


def _latent(model: GgufModel, index: int) -> dict[str, Lazy]:
    """What makes keys and values of the latent vector, head by head; keys' is applied to queries, so it is turned."""
    family, config, heads = model.family, model.config, model.widths[index].heads
    if family.latent is None:
        return {}
    maker = _stored(model, model.inside[index][f"{family.attention}.{family.latent[1]}.weight"])
    apart = maker.then(lambda rows: rows.unflatten(0, (heads, -1)))
    keys = config.qk_nope_head_dim
    return {
        "attn_k_b.weight": apart.then(lambda own: own[:, :keys].transpose(1, 2)),
        "attn_v_b.weight": apart.then(lambda own: own[:, keys:]),
    }


def _linear(model: GgufModel, architecture: Architecture, stored: dict[str, Lazy]) -> dict[str, Lazy]:
    """Tensors of a block with linear attention, as llama.cpp lays their heads out."""
    assert model.family.token_mixer is not None
    config, result = model.config, {name: lazy for name, lazy in stored.items() if "in_proj_qkvz" not in name}
    inside = f"{model.family.token_mixer.path}."
    if fused := stored.get(f"{inside}in_proj_qkvz.weight"):
        for layer, which in {"qkv": slice(3), "z": slice(3, None)}.items():
            result[f"{inside}in_proj_{layer}.weight"] = fused.then(partial(by_kind, config=config, which=which))
    result[f"{inside}A_log"] = result[f"{inside}A_log"].then(decays)
    if architecture.linear == "tiled":
        for leaf, change in tiled(config).items():
            result[inside + leaf] = result[inside + leaf].then(change)
    return result


def _experts(model: GgufModel, index: int) -> tuple[dict[str, Lazy], frozenset[str]]:
    """What a block's experts hold, and the stored names that it is taken from; nothing where there are none.

    Raises:
        SecateurError: a tensor of the experts is missing.
    """
    if not model.widths[index].experts:
        return {}, frozenset()
    layout = model.family.experts
    assert layout is not None
    checkpoint, pieces, found = model.checkpoint, list[str](), dict[str, Lazy]()
    for leaf, names in {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.items():
        name = model.parameter(index, leaf)
        stored = checkpoint.pieces(name)
        if not stored:
            raise SecateurError(f"{checkpoint.source}: block {index} has no {name}; restore it")
        pieces += stored
        # Its shape without reading it.
        shape = checkpoint.parameter_shape(name)
        whole = Lazy(shape, partial(checkpoint.read_parameter, name))
        if layout.inputs_first:
            whole = whole.then(lambda tensor: tensor.transpose(1, 2))
        if layout.alternating:
            pieces += checkpoint.pieces(f"{name}_bias")
            bias = _stored(model, pieces[-1])
        rows = whole.shape[1] // len(names)
        for place, part in enumerate(names):
            pick = partial(_rows_of, which=slice(place * rows, (place + 1) * rows))
            if layout.alternating:
                pick = partial(_rows_of, which=slice(place, None, len(names)))
                found[f"ffn_{part}_exps.bias"] = bias.then(pick)
            found[f"ffn_{part}_exps.weight"] = whole.then(pick)
    return found, frozenset(pieces)


def _rows_of(experts: Tensor, which: slice) -> Tensor:
    """Some rows of every expert's matrix."""
    return experts[:, which]


def _of_groups(fused: Tensor, which: str, groups: int, dim: int) -> Tensor:
    """The rows of queries, keys or values, where those of each group lie together."""
    part = {"q": slice(-2), "k": slice(-2, -1), "v": slice(-1, None)}[which]
    return fused.unflatten(0, (groups, -1, dim))[:, part].flatten(0, 2)


def _in_pairs(rows: Tensor, dim: int) -> Tensor:
    """Rows of each head reordered, so that entries which rotate together are neighbours."""
    return rows.unflatten(0, (-1, 2, dim // 2)).transpose(1, 2).reshape(rows.shape)


def _norm(model: GgufModel, name: str, stored: Lazy) -> Lazy:
    """The factors of a norm, also of one that adds one to what it stores; other tensors as they are."""
    return stored.then(lambda values: values.float() + 1) if model.family.norm_offset and adds_one(name) else stored


def _rescale(parts: dict[str, Lazy], ratio: float) -> None:
    """Multiply queries, where they were last multiplied by a weight."""
    for name in ("attn_q_norm.weight",) if "attn_q_norm.weight" in parts else ("attn_q.weight", "attn_q.bias"):
        if name in parts and ratio != 1:
            parts[name] = parts[name].then(lambda values: values.float() * ratio)


def _idle_head(model: GgufModel, architecture: Architecture) -> dict[str, Lazy]:
    """A head whose output is multiplied by zero."""
    hidden, dim = model.config.hidden_size, model.dim
    parts = {f"attn_{letter}.weight": Lazy.full((dim, hidden), 0.0) for letter in "qkv"}
    parts["attn_output.weight"] = Lazy.full((hidden, dim), 0.0)
    if architecture.head_norms:
        parts |= {f"attn_{letter}_norm.weight": Lazy.full((dim,), 1.0) for letter in "qk"}
    return parts


def _fill(parts: dict[str, Lazy], channels: int, model: GgufModel) -> None:
    """Add channels that give zero and are multiplied by zero."""
    hidden = model.config.hidden_size
    for layer in (layer for layer in model.layers if layer.startswith("ffn_")):
        down = layer == "ffn_down"
        lazy = parts.get(f"{layer}.weight", Lazy.full((hidden, 0) if down else (0, hidden), 0.0))
        extra = channels - lazy.shape[1 if down else 0]
        parts[f"{layer}.weight"] = lazy.then(partial(functional.pad, pad=(0, extra) if down else (0, 0, 0, extra)))
        if not down and f"{layer}.bias" in parts:
            parts[f"{layer}.bias"] = parts[f"{layer}.bias"].then(partial(functional.pad, pad=(0, extra)))


def _fuse(parts: dict[str, Lazy], layers: tuple[str, ...], name: str) -> None:
    """Stack the rows of several layers into one."""
    for leaf in ("weight", "bias"):
        found = [parts.pop(f"{layer}.{leaf}") for layer in layers if f"{layer}.{leaf}" in parts]
        if found:
            parts[f"{name}.{leaf}"] = Lazy.stack(found)
