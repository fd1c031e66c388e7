"""Description of a model's blocks, read off a tiny twin of its class."""

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cache
from inspect import getsource
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

import secateur
from secateur.base.cache import cached_value
from secateur.base.errors import SecateurError
from secateur.base.hashes import hash_json
from secateur.base.quiet import first_line, quiet
from secateur.checkpoints.modeling_secateur import SIZES, WIDTHS, positive
from secateur.families.entry import Entry
from secateur.families.family import NOWHERE, Experts, Family, Other, TokenMixer
from secateur.families.registry import UNKNOWN, assume
from secateur.layout.attention import Attention, output_of, read_attention
from secateur.layout.feed_forward import read_feed_forward
from secateur.layout.keys import OTHER, Keys, channels_key, factor_key, head_counts
from secateur.layout.mixture import experts_in, read_mixture
from secateur.layout.probe import LENGTH, BlockProbe, Call, find_blocks, first, is_matrix, record, same
from secateur.layout.proof import disproved
from secateur.layout.twin import class_of, number_of_blocks, tiny_config, tiny_twin
from secateur.model.describe import describe
from secateur.model.structure import inputs_first

NO_CHANNELS = "no row of its layers feeds one channel alone"
SECOND = "another module of the block is pruned in its role"
BESIDE = "its block has an attention, too"
OTHER_INPUTS = "its blocks take further inputs that depend on the tokens"


class Part(NamedTuple):
    """Module of a block that adds to the residual stream."""

    path: str | None
    """Submodule; None if its layers are children of the block itself."""
    output: str
    """Layer whose output is the module's, or the whole module where no single layer's is."""
    role: str
    """The part of a description that it belongs to: "attention", "feed_forward" or "token_mixer"."""
    fields: dict[str, Any]
    """Fields of the description."""
    numbers: tuple[int, int, int] = (0, 0, 0)
    """Numbers of heads and of KV groups, and the size of a head."""
    kept: str = ""
    """Why it is never pruned."""


PER_LAYER = "per_layer_config"
"""Config key of the values of single blocks."""
IRRELEVANT = re.compile(
    r"^_|token_id$|dtype$|^(architectures|auto_map|transformers_version|use_cache|id2label|label2id)$"
)
"""Config keys on which no description depends."""
_FOUND: dict[str, Family | SecateurError] = {}
"""Descriptions without functions and entry, and the reasons why there are none, by a hash of their facts."""


def derive(config: Any, entry: Entry, model_class: Any = None) -> Family:
    """Return the description of a model from its config and the entry of its family.

    Raises:
        SecateurError: The model cannot be pruned; with the reason that was found.
    """
    config = _dense(config)
    model_class = class_of(config, model_class)
    hooks: dict[str, Any] = {name: value for name, value in entry.stated.items() if callable(value)}

    def read() -> Family:
        without: dict[str, Any] = dict.fromkeys(hooks)
        return replace(_read(config, entry, model_class), **without)

    if (digest := hash_json(_facts(config, entry, model_class))) not in _FOUND:
        # The code of others changes without a new version of transformers.
        is_stock = model_class.__module__.startswith("transformers.models.")
        try:
            _FOUND[digest] = cached_value("classes", digest, Family, read) if is_stock else read()
        except SecateurError as error:
            _FOUND[digest] = error
    found = _FOUND[digest]
    if isinstance(found, SecateurError):
        raise found
    return replace(found, entry=entry, **hooks)


def _facts(config: Any, entry: Entry, model_class: Any) -> list[Any]:
    """Return all that a description depends on: the class, the config but for its sizes, the entry and the code."""
    try:
        small = tiny_config(config, range(number_of_blocks(config)))
    except Exception:
        # Whatever fails, the description will say so.
        small = config
    settings = {key: value for key, value in small.to_dict().items() if not IRRELEVANT.search(key)}
    stated = {key: _source(value) if callable(value) else repr(value) for key, value in entry.stated.items()}
    known = [repr(model_class), entry is UNKNOWN, stated]
    return [*_versions(), *known, json.loads(json.dumps(settings, default=str))]


def _source(function: Any) -> str:
    """Return the source of a function; if there is none, text that no other process has."""
    with suppress(OSError, TypeError):
        return getsource(function)
    return repr(function)


@cache
def _versions() -> list[Any]:
    """Return the versions of the libraries, and of this package with the files as they are."""
    files = sorted(Path(secateur.__file__).parent.rglob("*.py"))
    stamps = hash_json([[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files])
    return [torch.__version__, transformers.__version__, secateur.__version__, stamps]


def _dense(config: Any) -> Any:
    """Return the config of the stock model of which a pruned model's blocks are narrower copies."""
    if not hasattr(config, SIZES):
        return config
    with quiet(), positive(config):
        values = {key: value for key, value in config.to_dict().items() if key not in (SIZES, WIDTHS, PER_LAYER)}
        return type(config).from_dict(values)


def _read(config: Any, entry: Entry, model_class: Any) -> Family:
    try:
        # Rebuilt models draw random weights, which must not change the caller's random numbers.
        with torch.random.fork_rng(devices=[]):
            return _derived(config, entry, model_class)
    except SecateurError as error:
        raise SecateurError(f"model type '{config.model_type}' cannot be pruned: {error}") from error
    except Exception as error:
        # Reading a class that nobody has tried may fail anywhere.
        raise SecateurError(
            f"model type '{config.model_type}' cannot be pruned: its class was not understood ({first_line(error)})"
        ) from error


def _derived(config: Any, entry: Entry, model_class: Any) -> Family:
    stated = entry.stated
    if getattr(config, "is_heterogeneous", False):
        raise SecateurError("its config has values of its own for single blocks")
    twin = tiny_twin(config, model_class)
    model = twin.model
    blocks = find_blocks(model, len(twin.layers))
    if model.config.num_hidden_layers != len(twin.layers):
        raise SecateurError("num_hidden_layers in its config is not the number of its blocks")
    with quiet(), torch.no_grad():
        if entry is UNKNOWN:
            _check_causal(model)
        (probes, outside), (others, _) = (record(model, blocks, _ids(model, seed)) for seed in (0, 1))
        found: dict[str, Any] = {"blocks": blocks, "head_counts": "dense"}
        found |= _final_norm(model, outside, first(probes[-1].calls[""].output))
        mixers, counts = set[int](), set[tuple[int, int, int]]()
        for index, (probe, other) in enumerate(zip(probes[: twin.kinds], others, strict=False)):
            _check_inputs(probe, other)
            keys = Keys(model, blocks, index, stated)
            parts = _parts(probe, keys, found)
            counts |= {part.numbers for part in parts if part.role == "attention"}
            mixers |= {index for part in parts if part.role == "token_mixer"}
            for part in parts:
                _merge(found, _for_all(part, found))
                found |= _stock(probe, part, keys)
            sums = _sums(probe, parts, model.config)
            found["repeated"] = tuple(dict.fromkeys((*found.get("repeated", ()), *_repeated(probe))))
            found["changes_residual"] = found.get("changes_residual", False) or sums.pop("changes_residual", False)
            found["others"] = tuple(dict.fromkeys((*found.get("others", ()), *sums.pop("others"))))
            _merge(found, sums)
        if (mixer := found.get("token_mixer")) and mixer.path == found.get("attention"):
            found["token_mixer"] = replace(mixer, marker=_marker(probes, mixer.path, mixers))
        if not {"attention", "feed_forward"} & found.keys():
            raise SecateurError("none of its modules has units that can be removed")
        if len(counts) > 1:
            found.setdefault("heads_locked", "its blocks have different numbers of heads")
        if isinstance(stated.get("experts"), Mapping) and "experts" in found:
            stated = {**stated, "experts": replace(found["experts"], **stated["experts"])}
        family = Family(**{"attention": NOWHERE, "feed_forward": NOWHERE, **found, **stated})
        for probe in probes[: twin.kinds]:
            assume(model.config, family)
            for kind, reason in disproved(probe, describe(model.config, probe.block)).items():
                # Experts of which the entry says everything may have other inputs than the router chose.
                if kind == "experts" and isinstance(stated.get(kind), Experts):
                    continue
                if kind != "heads":
                    raise SecateurError(f"its {kind} cannot be removed: {reason}")
                family = replace(family, heads_locked=reason, attention_fixed=family.adds_residual)
    return family


def _repeated(probe: BlockProbe) -> tuple[str | int, ...]:
    """Return the arguments of a block that a batch needs once for each row.

    Raises:
        SecateurError: The arguments for one row do not fit a batch of two.
    """
    args, kwargs, output = probe.calls[""]
    given: list[tuple[str | int, Any]] = [*enumerate(args[1:]), *kwargs.items()]
    masks = [name for name, value in given if isinstance(value, Tensor) and value.dim() > 2]
    masks, wanted = [name for name in masks if name != "hidden_states"], torch.cat([first(output)] * 2)
    for names in ((), *((name,) for name in masks), masks):
        with suppress(Exception):
            # Some classes compute in float32, and then round differently for two rows.
            if (probe.run_as(probe.block, 2, names) - wanted).abs().max() < 1e-4 * wanted.abs().max():
                return tuple(names)
    raise SecateurError("the arguments of its blocks depend on the number of rows")


def _check_causal(model: Any) -> None:
    """Raise `SecateurError` if logits depend on later tokens."""
    ids = _ids(model, 0)
    other = ids.clone()
    other[0, -1] = int(ids[0, -1] == 0)
    before, after = (model(one, use_cache=False).logits[0, :-1] for one in (ids, other))
    # Some classes compute in float32, and round differently with other tokens in the row.
    if (before - after).abs().max() > 1e-5 * before.abs().max():
        raise SecateurError("its logits depend on later tokens, so it is no decoder")


def _marker(probes: list[BlockProbe], path: str, mixers: set[int]) -> str | None:
    """Return the name of a submodule or parameter that a token mixer has, and no other module at the same path."""
    inside, outside = list[set[str]](), set[str]()
    for index, probe in enumerate(probes):
        module = probe.block.get_submodule(path)
        names = {name for name, _ in (*module.named_children(), *module.named_parameters(recurse=False))}
        inside += [names] if index in mixers else []
        outside |= set() if index in mixers else names
    return next(iter(sorted(set.intersection(*inside) - outside)), None)


def _ids(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    return torch.randint(embedding.weight.shape[0], (1, LENGTH), generator=generator)


def _for_all(part: Part, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a module; in an attention, those of the blocks before it where one block decides for all."""
    if part.role != "attention":
        return part.fields
    locked = found.get("heads_locked", part.fields.get("heads_locked"))
    decided = {"heads_locked": locked} if locked else {}
    return part.fields | decided | {key: found[key] for key in ("ungrouped",) if key in found}


def _merge(found: dict[str, Any], fields: dict[str, Any]) -> None:
    """Add fields of one block to those of the blocks before it, which must be the same."""
    for name, value in fields.items():
        if found.setdefault(name, value) != value:
            raise SecateurError(f"its blocks differ: {name} is {found[name]} in one and {value} in another")


def _check_inputs(probe: BlockProbe, other: BlockProbe) -> None:
    """Raise `SecateurError` if the block takes further inputs that depend on tokens, or is run several times."""
    if "" not in probe.calls or probe.again:
        raise SecateurError("its blocks, or modules inside them, run several times")
    given = [{**dict(enumerate(one.calls[""].args)), **one.calls[""].kwargs} for one in (probe, other)]
    for key, value in given[0].items():
        # Positions, masks and rotary embeddings are the same for all tokens.
        tensors = [[one] if isinstance(one, Tensor) else one for one in (value, given[1].get(key))]
        if key not in (0, "hidden_states") and isinstance(tensors[0], (list, tuple)):
            for one, two in zip(*tensors, strict=False):
                if isinstance(one, Tensor) and not same(one, two):
                    raise SecateurError(OTHER_INPUTS)
    if not same(probe.run(), probe.output("")):
        raise SecateurError("its blocks depend on what ran before them")


def _parts(probe: BlockProbe, keys: Keys, found: Mapping[str, Any]) -> list[Part]:
    """Return the modules of a block in the order in which they run.

    Args:
        probe: The block.
        keys: Keys of the config.
        found: Fields of the description that blocks before this one have.
    """
    outermost = _outermost(probe)
    loose = [path for path in outermost if path in probe.layers]
    matrices = [path for path in outermost if path not in loose and _has_matrices(probe.block.get_submodule(path))]
    parts = [_part(probe, path, keys) for path in matrices]
    if len(loose) > 1:
        own = read_feed_forward(probe, None, loose[-1])
        loosely = Part(None, loose[-1], "feed_forward", own or {})
        parts.append(_unread(loosely, NO_CHANNELS) if own is None else loosely)
    for role in ("attention", "feed_forward"):
        several = [part for part in parts if part.role == role]
        # The one at the place that other blocks have it; else the one with experts; else the first.
        several.sort(key=lambda part: (found.get(role) != part.fields[role], "experts" not in part.fields))
        parts = [_unread(part, SECOND) if part in several[1:] else part for part in parts]
    if any(part.role == "attention" for part in parts):
        # A token mixer beside an attention is no module of the block, which then has one module in each role.
        parts = [_unread(part, BESIDE) if part.role == "token_mixer" else part for part in parts]
    # A norm with matrices adds nothing to the residual stream.
    inputs = [_input_of(probe, part) for part in parts if part.role != "unread"]
    return [
        part
        for part in parts
        if part.role != "unread" or not any(same(probe.output(part.output), one) for one in inputs)
    ]


def _unread(part: Part, why: str) -> Part:
    """Return a module as one that is never pruned."""
    return part._replace(output=part.path or part.output, role="unread", fields={}, kept=why)


def _has_matrices(module: nn.Module) -> bool:
    return any(is_matrix(part) for part in module.modules()) or experts_in(module) is not None


def _part(probe: BlockProbe, path: str, keys: Keys) -> Part:
    """Return what a module of a block is."""
    part, outputs = Part(path, path, "", {}), probe.outputs(path)
    if outputs == 0:
        return _unread(part, "it returns no tensor")
    if experts_in(probe.block.get_submodule(path)) is not None:
        experts = read_mixture(probe, path, keys)
        if isinstance(experts, str):
            return _unread(part, experts)
        return part._replace(role="feed_forward", fields={"feed_forward": path, "experts": experts})
    attention = read_attention(probe, path)
    if attention is not None:
        fields = _of_heads(attention, keys) | {"attention_outputs": outputs}
        return Part(path, f"{path}.{attention.fields['output']}", "attention", fields, attention[1:4])
    own = output_of(probe, path)
    if own is None:
        is_listed = any(isinstance(one, nn.ModuleList) for one in probe.block.get_submodule(path).modules())
        return _unread(part, "its experts are a list of layers" if is_listed else "its output is not that of one layer")
    if _mixes_tokens(probe, path):
        mixer = TokenMixer(path, own.removeprefix(f"{path}."), outputs=probe.outputs(path))
        return Part(path, own, "token_mixer", {"token_mixer": mixer})
    found = read_feed_forward(probe, path)
    if found is None or outputs > 1:
        return _unread(part, NO_CHANNELS)
    joins = same(probe.output(path), probe.output(own))
    return Part(path if joins else None, own, "feed_forward", found if joins else _of_block(found, path))


def _outermost(probe: BlockProbe) -> list[str]:
    """Return the called modules that are in no other called module than the block, in the order of their calls."""
    called = [path for path in probe.calls if path]
    return [path for path in called if not any(path.startswith(f"{other}.") for other in called)]


def _of_block(fields: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the fields of a feed-forward whose module adds the residual stream itself: its layers count as the
    block's."""
    named = {
        name: f"{path}.{fields[name]}"
        for name in ("up", "gate", "down", "fused_gate", "activation")
        if fields.get(name)
    }
    return fields | named | {"feed_forward": None}


def _mixes_tokens(probe: BlockProbe, path: str) -> bool:
    """Return whether a module's output for the last token depends on its inputs for others."""
    args, kwargs, output = probe.calls[path]
    changed = probe.input(path).clone()
    changed.reshape(-1, changed.shape[-1])[:-1] += 1
    name = next((key for key, value in kwargs.items() if value is probe.input(path)), None)
    module = probe.block.get_submodule(path)
    found = module(*args, **kwargs | {name: changed}) if name else module(changed, *args[1:], **kwargs)
    last = [first(one).reshape(-1, first(one).shape[-1])[-1] for one in (found, output)]
    return not same(*last)


def _of_heads(attention: Attention, keys: Keys) -> dict[str, Any]:
    """Return the fields of an attention, with those that say where its numbers of heads come from."""
    config, fields, locked = keys.config, dict(attention.fields), attention.locked
    own, heads, groups = getattr(config, "num_key_value_heads", None), attention.heads, attention.groups
    if (number := keys.stated.get("key_value_heads")) is not None:
        own = number(config)
    if config.num_attention_heads != heads:
        locked = locked or "its config does not say how many heads a block has"
    if "latent" not in fields:
        fields["ungrouped"] = groups == heads and own != heads
        if not fields["ungrouped"] and own != groups:
            locked = locked or "its config does not say how many KV groups a block has"
        size = None if fields.get("ungrouped") else getattr(config, "head_dim", None)
        if attention.dim != (size or config.hidden_size // heads):
            locked = locked or "its config does not say how large a head is"
    return fields | ({"heads_locked": locked} if locked else {})


def _stock(probe: BlockProbe, part: Part, keys: Keys) -> dict[str, Any]:
    """Return which config keys the class reads for the widths of a module, and which widths it takes."""
    if part.role == "attention":
        fixed = "latent" in part.fields or isinstance(getattr(type(keys.config), "head_dim", None), property)
        own = {} if fixed else {"head_dim": part.numbers[2]}
        return {"head_counts": head_counts(keys, part.output, _input_axis(probe, part.output), own)}
    if part.role != "feed_forward" or "experts" in part.fields:
        return {}
    key = channels_key(keys, part.output, _input_axis(probe, part.output))
    return {"derives_channels": True} if key is None else {"channels_key": key}


def _input_axis(probe: BlockProbe, layer: str) -> int:
    return int(not inputs_first(probe.block.get_submodule(layer)))


def _final_norm(model: nn.Module, outside: dict[str, Call], last: Tensor) -> dict[str, Any]:
    """Return the norm between the last block and the output layer, and whether it stores its gain minus one."""
    for path, call in outside.items():
        norm = model.get_submodule(path)
        if not [*norm.children()] and call.args and same(call.args[0], last) and isinstance(call.output, Tensor):
            return {"final_norm": path, "norm_offset": _has_offset(norm, call)}
    raise SecateurError("there is no norm after its last block")


def _has_offset(norm: nn.Module, call: Call) -> bool:
    """Return whether a norm whose tensors are zero returns something else than zeros."""
    before = {name: value.clone() for name, value in norm.named_parameters()}
    for value in norm.parameters():
        value.data.zero_()
    found = bool(before) and not same(norm(*call.args, **call.kwargs), torch.zeros_like(call.output))
    for name, value in norm.named_parameters():
        value.data.copy_(before[name])
    return found


def _sums(probe: BlockProbe, parts: list[Part], config: Any) -> dict[str, Any]:
    """Return how a block adds its modules' outputs to the residual stream.

    Raises:
        SecateurError: It has more than one stream.
    """
    found: dict[str, Any] = {
        "returns_tuple": not isinstance(probe.calls[""].output, Tensor),
        "others": tuple(
            Other(part.output, probe.outputs(part.output), part.kept) for part in parts if part.role == "unread"
        ),
    }
    if probe.hidden.dim() != 3 or not isinstance(probe.output(""), Tensor):
        raise SecateurError("its blocks have several residual streams")
    if not same(_alone(probe, parts, None)[0], probe.hidden):
        found["changes_residual"] = True
    factors = dict[str, Any]()
    for part in parts:
        if part.role == "unread":
            continue
        result, outputs = _alone(probe, parts, part)
        added, own = result - probe.hidden, first(outputs[part.output].output)
        norms = [path for path in outputs if path and _is_norm(probe, path)]
        after = next((path for path in norms if outputs[path].args and same(outputs[path].args[0], own)), None)
        own = own if after is None else outputs[after].output
        own = own.reshape(added.shape)
        factor = float((added * own).sum() / own.square().sum())
        factors[part.output] = factor_key(config, factor) if same(added, own * factor) else OTHER
        if after is not None:
            name = "feed_forward" if part.role == "feed_forward" else "attention"
            before = next((path for path in norms if same(probe.output(path), _input_of(probe, part))), None)
            found |= {f"norm_after_{name}": after, f"norm_before_{name}": before}
        if part.path is not None and not same(probe.output(part.path), probe.output(part.output)):
            found["adds_residual"] = True
    if OTHER in factors.values() or len(set(factors.values())) > 1:
        found["changes_residual"] = True
    elif factors:
        found["residual_multiplier"] = next(iter(factors.values()))
    return found


def _alone(probe: BlockProbe, parts: list[Part], part: Part | None) -> tuple[Tensor, dict[str, Call]]:
    """Return the output of a block in which one module alone is not zero, and the calls of its modules."""
    calls: dict[str, Call] = {}
    with ExitStack() as changes:
        for other in parts:
            if other is not part:
                changes.enter_context(probe.scaled(other.output, 0.0))
        changes.enter_context(_watching(probe, calls))
        return probe.run(), calls


def _watching(probe: BlockProbe, calls: dict[str, Call]) -> ExitStack:
    """Record the calls of all modules of a block while the returned context is open."""
    hooks = ExitStack()
    for path, module in probe.block.named_modules():

        def keep(_: Any, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            calls[path] = Call(args, kwargs, output)

        hooks.callback(module.register_forward_hook(keep, with_kwargs=True).remove)
    return hooks


def _is_norm(probe: BlockProbe, path: str) -> bool:
    """Return whether a module has one gain for each entry of the residual stream."""
    module = probe.block.get_submodule(path)
    weight = module._parameters.get("weight")
    return weight is not None and tuple(weight.shape) == (probe.hidden.shape[-1],)


def _input_of(probe: BlockProbe, part: Part) -> Any:
    """Return the input of a module."""
    if part.path is not None:
        return probe.input(part.path)
    return probe.input(str(part.fields.get("up") or part.fields.get("fused_gate")))
