"""Tiny twin of any decoder of transformers: a model of the same class, with the same kinds of blocks.

A twin runs in milliseconds, whatever the size of the model that it stands for. Its sizes differ from each other as far
as the class allows, so that its shapes show which size is which.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from secateur.base.errors import SecateurError
from secateur.base.quiet import first_line, quiet
from secateur.checkpoints.config_file import stock_class

MOST_KINDS = 8
"""Most blocks of a twin."""
VOCAB = 80
POSITIONS = 128
ROWS, TOKENS = 2, 12
"""Shape of the token ids with which a twin is tried."""


class Sizes(NamedTuple):
    """Sizes from which the others follow. Classes that compute the head size need a multiple of heads."""

    hidden: int
    head: int


TRIALS = Sizes(48, 16), Sizes(128, 16), Sizes(256, 32), None
"""Sizes that are tried one after the other; None stands for the model's own."""
LARGEST = 50_000_000
"""Most parameters of a small model with all blocks."""
MOST_BLOCKS = 1000
"""Most blocks of the model that a twin stands for."""
HEADS, ROPE = 8, 8
"""Number of heads, and the part of a head that latent attention rotates."""

LAYERS = re.compile(r"(n|num|decoder|num_decoder|encoder|num_encoder|num_hidden)_(layers?|blocks)")
INDEX = re.compile(r"layer_?(idx|index|id|number)|_idx|_index|^idx")
"""Attributes of modules that hold the index of a block."""
FIRST = re.compile(
    r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|max_window_layers|loop_layer_index_\w+"
)
"""Numbers of blocks, counted from the first, that are of another kind than the rest."""
LAST = re.compile(r"num_kv_shared_layers")
"""The same, counted from the last."""
UNCHANGED = re.compile(
    r"multiple_size|kernel|conv|pattern|period|offset|interval|step|expand|seed|_idx|iters|labels|rate$|factor"
)
POSITIONAL = re.compile(r"inv_freq|position|rotary|rope|mask")
RULES = {
    r"vocab": VOCAB,
    r"original_max_position": 32,
    r"max_.*positions?|n_positions|n_ctx|max_seq_len|model_max_length|context_length|rel_extent": POSITIONS,
    r"window|chunk|block_size|local_attention|compress": 32,
    r"index_topk|keep_window|budget": 16,
    r"experts_per_tok|top_?k|moe_k|n_?groups?$|expert_group|shared_experts$": 2,
    r"experts$|expert_num": 6,
    r"q_lora_rank": 20,
    r"kv_lora_rank": 26,
    r"time_step_rank|dt_rank": 3,
    r"rank": 10,
    r"v_head_dim": 10,
    r"linear_value_head_dim": 12,
    r"state": 14,
    r"index_n_heads": 3,
    r"shared.*(intermediate|ffn)": 44,
    r"(moe|expert).*(intermediate|ffn)": 28,
    r"intermediate_size_mlp|dense_intermediate": 104,
    r"intermediate|ffn_dim|ffn_hidden|n_inner|dim_ff|dff|ff_dim|feed_forward|d_inner": 72,
    r"multiple_of": 8,
    r"per_layer_input": 18,
}
"""Patterns of config keys, with the size that a twin has. Numbers below two stay what they are."""


LIMITS = (
    r"position|n_ctx|seq_len|max_length|context_length|extent|window|chunk|block_size|attention|compress|top_?k|tok$|moe_k"
    r"|group|shared_experts$"
)
"""Patterns of the keys of numbers that a twin may have smaller."""


class Twin(NamedTuple):
    """Tiny model, and the blocks of the large one that its blocks stand for."""

    model: Any
    layers: list[int]
    kinds: int
    """Number of its first blocks that show all kinds."""


def kept_layers(config: Any, model_class: Any = None) -> list[int]:
    """Return the first block of each kind of a model."""
    return _tried(config, model_class, lambda sizes: _kinds(config, class_of(config, model_class), sizes)[0])


def tiny_twin(config: Any, model_class: Any = None) -> Twin:
    """Return a small model with the class, the kinds of blocks and the settings of a config.

    Args:
        config: Config of a decoder of any size; it does not change.
        model_class: Class of the twin; by default the one for causal language models.

    Raises:
        SecateurError: No size that was tried gives a model that runs.
    """
    return _tried(config, model_class, lambda sizes: _twin(config, class_of(config, model_class), sizes))


def tiny_config(config: Any, layers: Sequence[int], sizes: Sizes | None = TRIALS[0]) -> Any:
    """Return a copy of a config with small sizes and some of the blocks; `sizes` of None keeps the model's own."""
    small = copy.deepcopy(config)
    if sizes is not None:
        _shrink(small, sizes)
    _pick(small, layers)
    return small


def class_of(config: Any, model_class: Any = None) -> Any:
    """Return the class of a model: the given one, or the one for causal language models."""
    return model_class or stock_class(MODEL_FOR_CAUSAL_LM_MAPPING, type(config))


def _tried(config: Any, model_class: Any, make: Any) -> Any:
    """Return what the first sizes give that the class accepts."""
    reasons = []
    with quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
        for sizes in TRIALS:
            try:
                torch.manual_seed(0)
                return make(sizes)
            except Exception as error:
                reasons.append(f"{type(error).__name__}: {first_line(error)}")
    raise SecateurError(f"{config.model_type}: no small model of its class runs ({reasons[0]})")


def _twin(config: Any, model_class: Any, sizes: Sizes | None) -> Twin:
    layers, kinds = _kinds(config, model_class, sizes)
    errors: list[Exception] = []
    for make in _candidates(config, model_class, sizes, layers, [kinds[layer] for layer in layers]):
        # Some routers compute in float32 whatever their model's precision.
        for double in (True, False):
            try:
                model = make()
                count = 1 if all(kind == kinds[0] for kind in kinds) else len(layers)
                return Twin(_ready(model.double() if double else model), layers, count)
            except Exception as error:
                errors.append(error)
    raise errors[0]


def _candidates(
    config: Any, model_class: Any, sizes: Sizes | None, layers: list[int], kinds: list[Any]
) -> Iterator[Callable[[], Any]]:
    """Yield functions that make a model of some blocks, the best first."""

    def small() -> Any:
        return _built(model_class, tiny_config(config, layers, sizes), "cpu")

    def cut() -> Any:
        model = _built(model_class, tiny_config(config, range(number_of_blocks(config)), sizes), "cpu")
        _cut(model, layers)
        return model

    try:
        found = _signatures(small())
    except Exception:
        found = []
    if found == kinds:
        yield small
    # Rules such as "every eighth block" hold in the whole model only.
    yield cut
    if [_outline(kind) for kind in found] == [_outline(kind) for kind in kinds]:
        # Each block may have modules for the other blocks that share its tensors.
        yield small


def _outline(kind: Any) -> list[Any]:
    """Return the names and classes of a block's own children."""
    return [(name, module) for name, module, _ in kind[0] if "." not in name]


def _ready(model: Any) -> Any:
    """Return a model with random numbers in its tensors, which has run once."""
    model, generator = model.eval().requires_grad_(False), torch.Generator().manual_seed(0)
    _randomise(model, generator)
    ids = torch.randint(model.get_input_embeddings().weight.shape[0], (ROWS, TOKENS), generator=generator)
    if not model(ids, use_cache=False).logits.isfinite().all():
        raise SecateurError("its logits are not finite")
    return model


def _built(model_class: Any, config: Any, device: str) -> Any:
    """Return a new model in evaluation mode, with plain code for attention and experts where the class has it."""
    config.use_cache = False
    config._experts_implementation = "eager"
    with built_on(device):
        try:
            eager = {"attn_implementation": "eager"}
            return model_class._from_config(copy.deepcopy(config), dtype=torch.float64, **eager)
        except ValueError:
            return model_class._from_config(config, dtype=torch.float64)


@contextmanager
def built_on(device: str) -> Iterator[None]:
    """Build models on a device; on the meta device no random values are drawn, which would take most of the time."""
    with torch.device(device), no_init_weights() if device == "meta" else nullcontext():
        yield


def _kinds(config: Any, model_class: Any, sizes: Sizes | None) -> tuple[list[int], list[Any]]:
    """Return the first block of each kind, and the kind of each block."""
    whole = tiny_config(config, range(number_of_blocks(config)), sizes)
    model = _built(model_class, whole, "meta")
    if (parameters := sum(p.numel() for p in model.parameters())) > LARGEST:
        raise SecateurError(f"{parameters} parameters are too many")
    kinds = _signatures(model)
    lists = [value for value in vars(config).values() if isinstance(value, list | tuple) and len(value) == len(kinds)]
    lists, own = [values for values in lists if not _ascending(values)], _overrides(config)
    first: dict[str, int] = {}
    for i, kind in enumerate(kinds):
        first.setdefault(repr((kind, own.get(i), [values[i] for values in lists])), i)
    layers = sorted(first.values())[:MOST_KINDS]
    return (layers if len(layers) > 1 else [*range(len(kinds))][:2]), kinds


def _signatures(model: nn.Module) -> list[Any]:
    """Return for each block its modules, shapes and settings, as far as they do not depend on its index."""
    return [
        (
            tuple((name, type(module).__name__, _settings(module)) for name, module in block.named_modules()),
            tuple((name, tuple(tensor.shape)) for name, tensor in block.state_dict().items()),
        )
        for block in _blocks(model)
    ]


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    return tuple(
        sorted(
            (name, repr(value))
            for name, value in vars(module).items()
            if not name.startswith("_") and isinstance(value, str | int | None) and not INDEX.search(name)
        )
    )


def _lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists of modules that are not inside another list, by name."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def _blocks(model: nn.Module) -> nn.ModuleList:
    """Return the list of modules with most parameters."""
    lists = [*_lists(model).values()]
    lists = [blocks for blocks in lists if len(blocks) == number_of_blocks(model.config)] or lists
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def _cut(model: nn.Module, layers: Sequence[int]) -> None:
    """Remove the other blocks of a model."""
    count = len(_blocks(model))
    for name, blocks in _lists(model).items():
        if len(blocks) == count:
            model.set_submodule(name, nn.ModuleList(blocks[layer] for layer in layers))
    for module in _blocks(model).modules():
        for name, value in list(vars(module).items()):
            if INDEX.search(name) and value in layers:
                setattr(module, name, layers.index(value))
    whole = number_of_blocks(model.config)
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for config in configs.values():
        if type(config) is type(model.config) and number_of_blocks(config) == whole:
            _pick(config, layers)


def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Replace constants by random numbers, so that nothing vanishes, and weights by larger ones."""
    stored = model.state_dict()
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        noise = torch.randn(value.shape, generator=generator).to(value.dtype) if value.is_floating_point() else None
        if noise is None or name not in stored or "A_log" in name or not value.numel():
            continue
        if isinstance(value, nn.Parameter) and value.dim() > 1:
            value.copy_(noise * value.shape[-1] ** -0.5)
        elif isinstance(value, nn.Parameter) or (not POSITIONAL.search(name) and (value == value.flatten()[0]).all()):
            # Gains are one, or zero where the class adds one itself; biases are zero.
            value.add_(0.3 * noise)


def _ascending(values: Sequence[Any]) -> bool:
    """Return whether a list holds indices."""
    return all(type(value) is int for value in values) and list(values) == sorted(set(values))


def number_of_blocks(config: Any) -> int:
    """Return the number of blocks of a decoder."""
    for name in ("decoder_layers", getattr(config, "attribute_map", {}).get("num_hidden_layers"), "num_hidden_layers"):
        if name and type(count := getattr(config, name, None)) is int:
            if count > MOST_BLOCKS:
                raise SecateurError(f"its config has {count:,} blocks")
            return count
    raise SecateurError("its config has no number of blocks")


def _pick(config: Any, layers: Sequence[int]) -> None:
    """Keep some blocks of a config: in numbers of blocks, lists with an entry for each block, and lists of blocks."""
    count, own = number_of_blocks(config), _overrides(config)
    for key, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and value and _ascending(value) and re.search("layer|idx|indices", key):
            setattr(config, key, type(value)(layers.index(layer) for layer in value if layer in layers))
        elif key == "block_types":
            # A cycle of kinds.
            setattr(config, key, type(value)(value[layer % len(value)] for layer in layers))
        elif isinstance(value, list | tuple) and len(value) == count:
            setattr(config, key, type(value)(value[layer] for layer in layers))
        elif isinstance(value, str) and len(value) == count and "pattern" in key:
            setattr(config, key, "".join(value[layer] for layer in layers))
        elif type(value) is not int:
            continue
        elif LAYERS.fullmatch(key) and value == count:
            setattr(config, key, len(layers))
        elif FIRST.fullmatch(key):
            setattr(config, key, sum(layer < value for layer in layers))
        elif LAST.fullmatch(key):
            setattr(config, key, sum(layer >= count - value for layer in layers))
    for key in [key for key in vars(config) if key.endswith("_period")]:
        # Find a rule with which the blocks that stay are of the same kinds.
        offset = key.removesuffix("period") + "offset"
        wanted = [layer % getattr(config, key) == getattr(config, offset, 0) for layer in layers]
        pairs = ((period, start) for period in range(1, len(layers) + 2) for start in range(period))
        for period, start in pairs:
            if [place % period == start for place in range(len(layers))] == wanted:
                setattr(config, key, period)
                setattr(config, offset, start)
                break
    if own:
        config.per_layer_config = {new: own[old] for new, old in enumerate(layers) if old in own}


def _overrides(config: Any) -> dict[int, dict[str, Any]]:
    """Return the settings of single blocks that differ from the model's."""
    spec = vars(config).get("_heterogeneity_spec")
    return copy.deepcopy(spec.per_layer_overrides) if spec else {}


def _shrink(config: Any, sizes: Sizes, outer: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Replace the sizes of a config by small ones; `outer` has the settings of the config around it."""
    names = {own: standard for standard, own in getattr(config, "attribute_map", {}).items()}
    whole = {**outer, **{names.get(key, key): value for key, value in vars(config).items()}}
    for key, value in vars(config).copy().items():
        if isinstance(value, PretrainedConfig):
            _shrink(value, sizes, whole)
        elif not key.startswith("_") and not key.endswith(("id2label", "label2id")):
            new = _changed(names.get(key, key), value, whole, sizes)
            if new != value:
                setattr(config, key, new)
    if own := _overrides(config):
        config.per_layer_config = {
            layer: {
                key: _changed(key, value, whole | values | {"head_dim": whole.get("head_dim")}, sizes)
                for key, value in values.items()
            }
            for layer, values in own.items()
        }


def _changed(key: str, value: Any, whole: Mapping[str, Any], sizes: Sizes) -> Any:
    """Return the small value of a setting."""
    if type(value) is int:
        return _number(key, value, whole, sizes)
    if isinstance(value, dict) and key.startswith("rope"):
        return _rope(value, *_heads(whole, sizes))
    if not isinstance(value, list | tuple) or any(type(v) is not int for v in value):
        return value
    if _ascending(value) and not key.endswith("token_id"):
        return value
    return type(value)(_number(key, v, whole, sizes) for v in value)


def _heads(whole: Mapping[str, Any], sizes: Sizes) -> tuple[int, int]:
    """Return the size of rotated heads in the model and in the twin."""
    if rope := whole.get("qk_rope_head_dim"):
        return rope, ROPE
    if head := whole.get("head_dim"):
        return head, sizes.head
    return (whole.get("hidden_size") or 1) // (whole.get("num_attention_heads") or 1) or 1, sizes.hidden // HEADS


def _rope(values: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """Return rotary settings for heads of another size."""

    def changed(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _rope(value, old, new)
        if key == "original_max_position_embeddings":
            return min(value, 32)
        if not isinstance(value, list | tuple):
            return value
        if "section" in key:
            parts = [part * new // old for part in value]
            return [sum(value) * new // old - sum(parts[1:]), *parts[1:]]
        return value[: len(value) * new // old]

    return {key: changed(key, value) for key, value in values.items()}


def _number(key: str, value: int, whole: Mapping[str, Any], sizes: Sizes) -> int:
    """Return the small value of a number."""
    heads, hidden, rope = (whole.get(k) for k in ("num_attention_heads", "hidden_size", "qk_rope_head_dim"))
    expand = next((v for k, v in whole.items() if re.fullmatch("(mamba_)?expand", k)), None)
    if re.search(r"token_id$|_index$", key):
        return min(value, 3)
    if value < 2 or LAYERS.fullmatch(key) or FIRST.fullmatch(key) or UNCHANGED.search(key):
        return value
    if key in ("hidden_size", "d_model", "embedding_dim", "emb_dim"):
        return sizes.hidden
    if key == "rotary_dim":
        old, new = _heads(whole, sizes)
        return value * new // old
    if re.search(r"(key_value|kv)(_n)?_heads|query_groups", key):
        return HEADS if value == whole.get("swa_num_attention_heads" if "swa" in key else "num_attention_heads") else 2
    if key.startswith("linear_num_key"):
        return HEADS if value == whole.get("linear_num_value_heads") else 2
    if expand and re.fullmatch(r"(mamba_(n|num)|n_mamba)_heads|num_heads|mamba_d_ssm", key):
        return int(expand * sizes.hidden) // (1 if key == "mamba_d_ssm" else sizes.head)
    if "attention_hidden_size" in whole and key in ("head_dim", "attention_head_dim"):
        return value * whole["num_attention_heads"] * sizes.hidden // (whole["hidden_size"] * HEADS)
    for pattern, size in RULES.items():
        if re.search(pattern, key):
            # Small sizes could be equal, and would not show which is which.
            return min(size, value) if re.search(LIMITS, key) else size
    if re.search(r"head_?dim|head_size|d_head|dim_head|kv_channels", key):
        if rope and "linear" not in key:
            return value * ROPE // rope
        dense = whole.get("head_dim")
        return sizes.head if value <= (dense or value) or re.search("mamba|linear", key) else sizes.head + 8
    if re.search(r"heads?$|heads_per_layer$", key):
        return HEADS if value == heads or heads is None else 2 * HEADS
    if value == hidden:
        return sizes.hidden
    return value if value <= 64 else max(8, value * sizes.hidden // (hidden or value))
