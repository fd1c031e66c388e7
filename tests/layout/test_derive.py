"""Structure that is read off a class equals what entries declare; every decoder of transformers is read or refused."""

import os
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS

from models import MIXTURES, ROWS, SIMILAR, config_of, make_tokenizer
from secateur import Options, SecateurError, prune
from secateur.base.quiet import quiet
from secateur.families.registry import FAMILIES, known_family
from secateur.layout.derive import derive
from secateur.layout.twin import tiny_twin

NOT_DERIVED = {
    # Facts about llama.cpp, vLLM, transformers 4.57 and GGUF files.
    *("gguf", "vllm", "stock", "gating", "gates_sum_to_one", "stacked", "inputs_first", "alternating", "layer_type"),
    # Names in checkpoints, which models without an entry have from transformers' conversions.
    "renamed",
    # Entries say them for all configs of a family: "if the config has this key".
    *("pre_norm", "locked_if", "key_value_heads", "changes_residual", "activation", "heads_locked", "attention_fixed"),
    # Derived only where another module has the same path.
    "marker",
    # Some routers take both shapes.
    "batched_router",
}
"""Fields in which a derived description differs from an entry."""
BENIGN = {
    # Blocks without a latent vector of queries have the other layer.
    "queries": ("q_b_proj", "q_proj"),
    "latent_queries": ("q_proj", "q_b_proj"),
    # transformers has two names for the key.
    "number": ("num_local_experts", "num_experts"),
}
ALLOWED = {"falcon": {"ungrouped", "interleaved", "repeated"}, "codegen": {"interleaved"}, "opt after": {"final_norm"}}
# Gates on the inputs of experts are not understood.
ALLOWED["llama4_text"] = {"experts", "feed_forward", "others"}
"""Fields that may differ, by case or family."""
REFUSED = {"gemma4_text": "token|residual|single blocks"}
"""Families whose entries say what cannot be derived, each with a part of the reason."""


def differences(found: Any, declared: Any) -> dict[str, Any]:
    """Return the fields of a derived description that differ from an entry, with both values."""
    result: dict[str, Any] = {}
    for one in fields(declared):
        values = getattr(found, one.name), getattr(declared, one.name)
        if one.name in NOT_DERIVED or values[0] == values[1] or values == BENIGN.get(one.name):
            continue
        if all(map(is_dataclass, values)):
            result |= differences(*values)
        else:
            result[one.name] = values
    return result


@pytest.mark.parametrize("name", [*ROWS, *SIMILAR, *MIXTURES])
def test_equals_the_entry(name):
    config = config_of(name)
    kind = config.model_type
    declared = FAMILIES[kind]
    if kind in REFUSED:
        with pytest.raises(SecateurError, match=REFUSED[kind]):
            derive(config)
        return
    found = derive(config)
    locked, wanted = found.heads_locked is not None, declared.lock(config) is not None
    # Norms that differ from head to head are seen when a block is described. Falcon's entry computes its KV groups.
    assert locked == wanted or declared.locked_if
    assert found.keeps_residual(config) == declared.keeps_residual(config)
    assert differences(found, declared).keys() <= ALLOWED.get(name, ALLOWED.get(kind, set()))


ALONE = [kind for kind in DECODERS if kind not in FAMILIES and kind in CONFIG_MAPPING]
SOME = ("exaone", "falcon_h1", "nemotron_h", "jamba", "deepseek_v32", "olmo_hybrid", "minimax", "afmoe", "gpt_bigcode")
EVERY = bool(os.environ.get("EVERY_DECODER"))
"""Whether all decoders are pruned: with EVERY_DECODER=1, which takes five minutes."""
AT_LEAST = 120
"""Number of decoders, with and without an entry, that can be pruned."""


def default_config(kind: str) -> Any:
    """Return the config of a class's decoder with its default values; None if the class refuses its own."""
    with quiet():
        try:
            config = CONFIG_MAPPING[kind]()
        except Exception:
            return None
    return config if getattr(config, "text_config", None) is None else None


def test_every_decoder_is_read_or_refused():
    derived, refused = list[str](), dict[str, str]()
    for kind in ALONE:
        if (config := default_config(kind)) is None:
            continue
        try:
            derived.append((kind, derive(config).blocks)[0])
        except SecateurError as error:
            refused[kind] = str(error)
    assert all(text.startswith(f"model type '{kind}' cannot be pruned: ") for kind, text in refused.items())
    assert set(SOME) <= set(derived)
    assert len(derived) + len(set(FAMILIES) & set(DECODERS)) >= AT_LEAST, refused


@pytest.mark.parametrize("kind", ALONE if EVERY else SOME)
def test_is_pruned_and_opens(tmp_path, kind):
    config = default_config(kind)
    if config is None or known_family(config) is None:
        pytest.skip("its default config is refused")
    model = tiny_twin(config).model.float()
    model.save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    ids = torch.randint(4, 70, (2, 16), generator=torch.Generator().manual_seed(0))
    options = Options(sparsity=0.1, effort="quick", samples=8, length=16, calibration="random", round=1)
    prune(str(tmp_path / "dense"), tmp_path / "out", options)
    with torch.no_grad():
        small = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.float32)
        logits = small.eval()(ids, use_cache=False).logits
        cached = small(ids, use_cache=True).logits
    assert logits.isfinite().all()
    assert torch.allclose(logits, cached, atol=1e-4)
    size = [sum(p.numel() for p in one.parameters()) for one in (small, model)]
    assert size[0] < size[1]
