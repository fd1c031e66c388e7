"""The config.json of a checkpoint: read it, and refuse models that cannot be pruned before any long work."""

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, GenerationConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)

from secateur.base.errors import SecateurError
from secateur.base.json_files import parse_json
from secateur.base.quiet import first_line, quiet
from secateur.checkpoints.modeling_secateur import PREFIX, SIZES, WIDTHS
from secateur.checkpoints.quantised import quantisation, quantisation_unsupported
from secateur.families.registry import FAMILIES, TWINS

# transformers 5 has this class, but lists it only among the classes for images.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("mistral4", "Mistral4ForCausalLM")

TOWER_CONFIGS = ("vision_config", "audio_config", "speech_config", "encoder_config")
"""Keys of a multimodal model's config that hold the config of a tower."""
_LARGE = 2**28
"""Entries of a tensor from which on it is certainly a parameter, and no buffer whose values are needed."""
MAPPINGS = {
    "AutoModel": MODEL_MAPPING,
    "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING,
    "AutoModelForSequenceClassification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "AutoModelForTokenClassification": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
}
"""Auto classes that load the pruned model, some with a new head, with transformers' stock classes by config class."""
_OWN: dict[str, Any] = {}
"""Config classes of checkpoints' own code that the user has allowed, by model_type."""
_OWN_CLASSES: dict[type, dict[str, Any]] = {}
"""The classes of models in that code, by config class and auto class."""
_SIZES = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
)
_SIZE_KEY = re.compile("size|dim|embd|inner|rank|layer|head|expert|hidden|ffn|d_model|ratio|expan|group|conv|block")
"""Words in config keys of sizes."""
_MOST, _MOST_EXPERTS = 2**24, 2**16
"""Largest size of any kind, and largest number of experts: with much larger ones, models take hours to describe."""
_DROPPED = ("dropout", "pdrop", "layerdrop")
"""Endings of config keys with dropout rates, which torch would check only when a block runs."""
QUERY_HEADS, GROUPS, PER_GROUP = "num_attention_heads", "num_key_value_heads", "num_key_value_groups"
"""Config keys of the number of query heads, of key/value heads, and of query heads per key/value head."""

BIASES = ("attention_output_bias", "feed_forward_output_bias")
"""Keys for a bias of the output projection that the stock class does not have."""
READ = frozenset(
    ("head_dim", "original_max_position_embeddings", "quantization_config", WIDTHS, SIZES, GROUPS, PER_GROUP, *BIASES)
)
"""Keys that transformers or secateur reads, although many config classes do not declare them."""
_ROPE_KEYS = ("partial_rotary_factor", "alpha", "llama_4_scaling_beta")
"""Rotary settings that only some models read."""
_SHARED = ("model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "tie_word_embeddings")
"""Keys that a multimodal model and its language model both have."""
TEXT = "text_config"
"""Key of the language model's config in the config of a multimodal model."""


def read_config(folder: Path) -> dict[str, Any]:
    """Return the contents of config.json.

    Raises:
        SecateurError: The file is missing or not JSON, or a value that every model needs is missing or impossible.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise SecateurError(_no_config(folder))
    raw = _parsed(file)
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise SecateurError(f"{file}: no model_type, so this is not a transformers model; check the folder")
    classes, inner = raw.get("architectures") or [], raw.get(TEXT) or {}
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise SecateurError(f"{file}: architectures is {classes!r}, not a list of class names; correct the file")
    if not isinstance(inner, dict):
        raise SecateurError(f"{file}: {TEXT} is {inner!r}, not the config of a model; correct the file")
    for key, value in _numbers(raw):
        if key.endswith(_DROPPED) and not 0 <= value <= 1:
            raise SecateurError(f"{file}: {key} is {value}, not a number between 0 and 1; correct the file")
        if _SIZE_KEY.search(key) and not value <= (most := _MOST_EXPERTS if "experts" in key else _MOST):
            raise SecateurError(f"{file}: {key} is {value:,}, more than {most:,}; correct the file")
    return raw


def _numbers(raw: Any) -> Iterator[tuple[str, int | float]]:
    """Yield all numbers in a JSON value, each with the key that it has or whose list it is in."""
    rest = [("", raw)]
    while rest:
        key, value = rest.pop()
        if isinstance(value, int | float):
            yield key, value
        elif isinstance(value, dict):
            rest += value.items()
        elif isinstance(value, list):
            rest += ((key, part) for part in value)


def _parsed(file: Path) -> Any:
    """Return the value in a JSON file.

    Raises:
        SecateurError: The file is not JSON.
    """
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise SecateurError(f"{file}: not valid JSON at {where} ({error.msg}); download it again") from error
    except UnicodeDecodeError as error:
        raise SecateurError(f"{file}: byte {error.start} is not UTF-8 text; download it again") from error
    except ValueError as error:
        raise SecateurError(f"{file}: {error} for a config; download it again") from error


class _LargeOnMeta(TorchFunctionMode):
    """Mode in which large tensors are created without memory.

    `init_empty_weights` moves a parameter to the meta device after its creation. The matrices of all experts of a block
    are one parameter, which may need more memory than the machine has.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch; `torch.empty` and `torch.zeros` give large tensors on the meta device."""
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros) and kwargs.get("device") is None:
            made = func(*args, **kwargs | {"device": "meta"})
            if made.numel() >= _LARGE:
                return made
        return func(*args, **kwargs)


def empty_model(auto: Any, config: Any) -> Any:
    """Build the model of a config in float32, with its parameters on the meta device.

    Args:
        auto: An auto class of transformers, or the class of a model.
        config: The config object.
    """
    make = made_by(auto, config)._from_config
    # Without no_init_weights, drawing random values for parameters that have no memory would take most of the time.
    with init_empty_weights(include_buffers=False), no_init_weights(), _LargeOnMeta():
        return make(config, dtype=torch.float32).eval()


def has_own_code(config: Any) -> bool:
    """Return whether the class of a config object comes from the checkpoint's own code."""
    return type(config).__module__.startswith("transformers_modules")


def load_config(folder: Path, raw: dict[str, Any], *, trust_remote_code: bool) -> Any:
    """Return the transformers config object of a decoder language model, or of a multimodal model.

    Stock classes are preferred: the checkpoint's own code runs only if transformers does not know the model_type and
    the user trusts the code. A padding token outside the vocabulary is removed from the object and from `raw`, because
    transformers builds no model with it.

    Raises:
        SecateurError: The model is of another kind, is unknown to transformers, or is quantised in an unknown way.
    """
    file, kind = folder / "config.json", raw["model_type"]
    _check_readable(file, raw, trust_remote_code)
    own_classes = {} if kind in CONFIG_MAPPING else raw["auto_map"]
    config = _config_object(folder, own_code=kind not in CONFIG_MAPPING)
    inner = getattr(config, TEXT, None)
    # transformers keeps a config that the class does not have as the dictionary that it is.
    if isinstance(inner, dict):
        raise SecateurError(f"{file}: {kind} has no {TEXT}; correct model_type, or remove {TEXT}")
    for part, stored in ((config, raw), (inner, raw.get(TEXT))):
        if part is not None:
            _check_sizes(file, part)
            _prepare(part, stored)
    if config.is_encoder_decoder:
        raise SecateurError(f"{file}: {kind} is an encoder-decoder model; use a decoder-only model")
    if tower := next((key for key in TOWER_CONFIGS if raw.get(key)), None):
        _check_multimodal(file, raw, config, tower)
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in own_classes:
        raise SecateurError(f"{file}: {kind} has no causal language model class; use a decoder-only model")
    if own_classes:
        _learn_classes(folder, config, own_classes)
    return config


def _learn_classes(folder: Path, config: Any, names: Mapping[str, Any]) -> None:
    """Let `stock_class` find the classes of the checkpoint's own code.

    transformers' own tables stay as they are: what they name comes before the code of a folder that somebody opens.

    Raises:
        SecateurError: The code is elsewhere, or does not run.
    """
    _OWN[config.model_type], own = type(config), dict[str, Any]()
    for auto, name in names.items():
        if auto not in MAPPINGS:
            continue
        if "--" in name:
            raise SecateurError(f"{folder / 'config.json'}: {name} is code of another model; copy it into the folder")
        try:
            with quiet():
                found = get_class_from_dynamic_module(name, folder)
        except Exception as error:
            raise SecateurError(f"{folder}: {name} cannot be imported ({first_line(error)}); correct it") from error
        # The class of a pruned model is made of the one before.
        own[auto] = found.__mro__[2] if found.__name__.startswith(PREFIX) else found
    _OWN_CLASSES[type(config)] = own


def stock_classes(config_class: type) -> dict[str, Any]:
    """Return the stock classes of a config class by auto class."""
    known = {auto: stock_class(found, config_class) for auto, found in MAPPINGS.items() if config_class in found}
    return known or _OWN_CLASSES.get(config_class, {})


def own_code(config: Any) -> dict[str, dict[str, str]]:
    """Return the key of config.json that names the classes of the checkpoint's own code; empty for transformers'."""
    classes = {"AutoConfig": type(config)} | stock_classes(type(config))
    if not has_own_code(config):
        return {}
    return {"auto_map": {auto: f"{one.__module__.rpartition('.')[2]}.{one.__name__}" for auto, one in classes.items()}}


def _check_readable(file: Path, raw: dict[str, Any], trust_remote_code: bool) -> None:
    """Raise `SecateurError` for an unknown quantisation, and for a model_type without a class that may be used."""
    kind, settings = raw["model_type"], quantisation(raw)
    if settings is not None and (why := quantisation_unsupported(settings)):
        raise SecateurError(f"{file}: {why}; use an unquantised checkpoint")
    if kind in CONFIG_MAPPING:
        return
    if not raw.get("auto_map"):
        raise SecateurError(
            f"{file}: transformers {transformers.__version__} does not know model_type {kind!r}; "
            "upgrade transformers, or check the spelling"
        )
    if not trust_remote_code:
        raise SecateurError(
            f"{file}: {kind} needs code that comes with the checkpoint (auto_map); "
            "read that code, then pass trust_remote_code"
        )


def _config_object(folder: Path, own_code: bool) -> Any:
    """Return the config object that transformers makes of config.json.

    Raises:
        SecateurError: transformers rejects the file.
    """
    try:
        with quiet():
            return AutoConfig.from_pretrained(folder, trust_remote_code=own_code)
    except Exception as error:
        # The last line of the validators' message says what is wrong.
        reason = ([line.strip() for line in str(error).splitlines() if line.strip()] or [first_line(error)])[-1]
        raise SecateurError(
            f"{folder / 'config.json'}: transformers rejects it ({reason}); correct the file"
        ) from error


def config_of(raw: dict[str, Any]) -> Any:
    """Return the config object of the contents of a config.json whose class is known."""
    kind = raw["model_type"]
    with quiet():
        values = json.loads(json.dumps(raw), object_hook=_special_float)
        return (_OWN.get(kind) or CONFIG_MAPPING[kind]).from_dict(values)


def prepared_config(raw: dict[str, Any]) -> Any:
    """Return the config object of `config_of`, with values set so that its blocks can be built one by one."""
    config = config_of(raw)
    for part in (config, getattr(config, TEXT, None)):
        if part is not None:
            _prepare(part, None)
    return config


def _special_float(value: dict[str, Any]) -> Any:
    """Return the number that transformers writes into JSON as an object, such as infinity; or the object itself."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def _check_sizes(file: Path, config: Any) -> None:
    """Raise `SecateurError` for a size that is not a whole number."""
    for key in _SIZES:
        # The stored value, under the name that the class has for the key.
        size = vars(config).get(config.attribute_map.get(key, key))
        if size is not None and (type(size) is not int or size < 0):
            raise SecateurError(f"{file}: {key} is {size!r}, not a whole number; correct the file")


def _prepare(config: Any, stored: dict[str, Any] | None) -> None:
    """Set values of a config object so that its blocks can be built and run one by one.

    Args:
        config: The config object.
        stored: Its part of config.json, in which an impossible padding token is removed too.
    """
    _forget_unread(config)
    if (getattr(config, "pad_token_id", None) or 0) >= getattr(config, "vocab_size", float("inf")):
        config.pad_token_id = None
        if stored is not None:
            stored["pad_token_id"] = None
    # In Gemma 4, heads differ between blocks, and transformers refuses to read a global value of such keys. The global
    # values that are read here are the same in all blocks.
    config.allow_global_per_layer_attribute_access = True
    # Before 5.22, transformers chooses an attention function that leaves softcaps out.
    config._attn_implementation = "eager" if getattr(config, "attn_logit_softcapping", None) else None
    # These settings say how a whole model runs, but here each block runs by itself.
    config.return_dict, config.output_attentions, config.output_hidden_states = True, False, False
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False


def _forget_unread(config: Any) -> None:
    """Remove keys that happen to be in config.json although the model's class does not read them.

    All code that asks a config object how the model computes relies on their absence.
    """
    kind: Any = type(config)
    if has_own_code(config) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    for key in vars(config).keys() - _declared(kind) - READ:
        if not key.startswith("_"):
            delattr(config, key)
    rope, code = getattr(config, "rope_parameters", None) or {}, _code(kind)
    for settings in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        # transformers' own functions compute scaled frequencies, and read all settings.
        if settings.get("rope_type") == "default":
            for key in _ROPE_KEYS:
                if f'"{key}"' not in code:
                    settings.pop(key, None)


@cache
def _declared(kind: type) -> frozenset[str]:
    """Return the keys that a config class declares."""
    with quiet():
        return frozenset(dir(kind()))


@cache
def _code(kind: type) -> str:
    """Return the code of the model's class for a config class."""
    module = inspect.getmodule(stock_class(MODEL_FOR_CAUSAL_LM_MAPPING, kind))
    assert module is not None
    return inspect.getsource(module)


def _check_multimodal(file: Path, raw: dict[str, Any], config: Any, tower: str) -> None:
    """Check a multimodal model, and give its language model a part of its own in an older config.json.

    Args:
        file: config.json, for error messages.
        raw: Contents of the file.
        config: The config object.
        tower: Config key of a tower, for error messages.

    Raises:
        SecateurError: The language model is not supported, or transformers does not open the whole model.
    """
    inner = getattr(getattr(config, TEXT, None), "model_type", None)
    supported = _family_name(inner) in FAMILIES
    if supported and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        if inner in TWINS and not raw.get(TEXT):
            _nest(raw, config)
        return
    language_model = f"whose language model ({inner})" if inner else "whose language model"
    reason = (
        f"that secateur cannot open; save its {inner} as a causal language model, and prune that"
        if supported
        else f"{language_model} is not supported; secateur families prints those that are"
    )
    raise SecateurError(f"{file}: {raw['model_type']} is a multimodal model ({tower}) {reason}")


def _family_name(kind: Any) -> Any:
    """Return the model_type of the family whose entry describes a model."""
    return TWINS[kind].family if kind in TWINS else kind


def decoder_config(whole: Any) -> Any:
    """Return the config object of a multimodal model's language model. If that has a twin family, return the twin's
    config, with the original model_type in `twin_of`."""
    own = whole.text_config
    if own.model_type in TWINS:
        found = TWINS[own.model_type]
        values = {key: value for key, value in own.to_dict().items() if key not in ("model_type", "architectures")}
        with quiet():
            twin = CONFIG_MAPPING[found.family].from_dict(values | dict(found.settings))
        _forget_unread(twin)
        twin.allow_global_per_layer_attribute_access, twin.twin_of = True, own.model_type
        own = twin
    # The multimodal model's config decides whether the output layer is the embedding.
    own.tie_word_embeddings = whole.tie_word_embeddings
    return own


def _nest(raw: dict[str, Any], config: Any) -> None:
    """Move the language model's keys in an older config.json into `text_config`."""
    own = config.text_config.to_dict()
    for key in (*own, "rope_scaling", "rope_theta"):
        if key not in _SHARED and not key.endswith("token_id"):
            raw.pop(key, None)
    raw[TEXT] = own


def check_generation(folder: Path) -> None:
    """Raise `SecateurError` for a generation_config.json that would keep transformers from opening the output."""
    try:
        with quiet():
            GenerationConfig.from_pretrained(folder)
    except OSError:
        # transformers uses defaults if the file is missing or cannot be read.
        pass
    except Exception as error:
        file = folder / "generation_config.json"
        raise SecateurError(f"{file}: transformers rejects it ({first_line(error)}); correct or remove it") from error


def stock_class(classes: Any, config_class: type) -> Any:
    """Return the stock class of a config from a mapping of transformers.

    `secateur.register` puts an object in its place.
    """
    if own := _OWN_CLASSES.get(config_class):
        return own[next(auto for auto, found in MAPPINGS.items() if found is classes)]
    found = classes[config_class]
    return getattr(found, "stock", found[0] if isinstance(found, tuple) else found)


def made_by(auto: Any, config: Any) -> Any:
    """Return the class of a model that an auto class makes of a config; the class of a model makes its own.

    Classes of a checkpoint's own code are found without transformers' question about it, and stock classes also after
    `secateur.register`.
    """
    return stock_class(auto._model_mapping, type(config)) if hasattr(auto, "_model_mapping") else auto


def _no_config(folder: Path) -> str:
    """Return the error for a folder without config.json."""
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        return f"{folder}: no config.json, but {ggufs[0].name}; name that file instead of the folder"
    if (folder / "adapter_config.json").is_file():
        return f"{folder}: an adapter without its base model; merge it into the base model first"
    return f"{folder}: no config.json; name a folder saved by transformers"
