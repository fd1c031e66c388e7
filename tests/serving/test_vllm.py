"""vLLM scores and continues prompts with pruned folders as transformers does, and fails where secateur says so.

vLLM needs its own torch and transformers, so these tests have an environment of their own: `make test-vllm`.
"""

import gc
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import models as tiny
import secateur
from models import _config, blocks_of, build, own_axes, relative, save, token_rows, wide, write_pruned
from secateur import open_checkpoint, trim
from secateur.base.quiet import quiet
from secateur.commands.doctor import check_engines
from secateur.formats.vllm import vllm_unsupported
from secateur.model.axes import Width
from secateur.model.per_layer import model_class, widths_of
from secateur.model.structure import Block, KeptUnits
from secateur.model.surgery import first_units
from secateur.model.units.experts import EXPERT_CHANNELS, EXPERTS
from tiny_tokenizers import SENTENCES, save_tokenizer

# In this process, on one thread, with a small cache.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02}
"""Accepted deviation of a log-likelihood from transformers' in float32, relative to the largest, by vLLM's dtype."""
PROMPT, NEW = 24, 12

# On a CPU vLLM's attention needs heads of at least 32 entries; in Qwen2 and others the size is hidden size / heads.
HEAD = {"head_dim": 32}
HEADS = HEAD | {"global_head_dim": 32}
WIDE = {"hidden_size": 192}
SIZE, FED = {"hidden_size": 64}, {"moe_intermediate_size": 64}
SIZED = tiny.LATENT | {"q_lora_rank": 32, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
SIZED |= dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 32)
LEAD = tiny.ROUTED | {"first_k_dense_replace": 0}
tiny.ROWS |= {
    "llama": _config("llama", **tiny.GROUPED, **HEAD),
    "llama text": _config("llama", **tiny.GROUPED, **HEAD | {"vocab_size": 901, "eos_token_id": 900}),
    "llama every head": _config("llama", num_key_value_heads=6, **HEAD),
    "mistral window": _config("mistral", **tiny.TRIPLES, **HEAD, sliding_window=5),
    "qwen2": _config("qwen2", **tiny.TRIPLES, **WIDE),
    "qwen2 window": _config(
        "qwen2", **tiny.GROUPED, **WIDE, sliding_window=6, use_sliding_window=True, max_window_layers=1
    ),
    "qwen3": _config("qwen3", **tiny.GROUPED, **HEAD),
    "gemma2": _config("gemma2", **(tiny.GEMMA | HEAD)),
    "gemma3_text": _config("gemma3_text", **(tiny.GEMMA | HEAD)),
    "phi3": _config("phi3", **tiny.GROUPED, **WIDE, partial_rotary_factor=0.5),
    "olmo2": _config("olmo2", **tiny.GROUPED, **WIDE),
    "opt": _config("opt", "intermediate_size", **WIDE, ffn_dim=96, word_embed_proj_dim=192),
    "gpt2": _config("gpt2", "intermediate_size", **WIDE, n_inner=96),
    "gpt_neox": _config("gpt_neox", **WIDE, rotary_pct=0.5, intermediate_size=96),
    "gemma4_text served": _config("gemma4_text", **tiny.GEMMA4 | HEADS),
    "gemma4_text small served": _config("gemma4_text", "num_hidden_layers", **tiny.GEMMA4_SMALL | HEADS),
    "gemma4_text mixture served": _config(
        "gemma4_text", **tiny.GEMMA4 | HEADS, **SIZE, **tiny._EXPERTS | FED, enable_moe_block=True, top_k_experts=3
    ),
    # Kernels of experts need sizes that are multiples of 32.
    "qwen3_moe served": _config(
        "qwen3_moe", **tiny.GROUPED, **HEAD, **SIZE, **tiny._EXPERTS | FED, norm_topk_prob=True
    ),
    "glm4_moe served": _config(
        "glm4_moe", **tiny.GROUPED, **HEAD, **SIZE, **LEAD | FED, n_shared_experts=2, n_group=1, topk_group=1
    ),
    "llama4_text served": _config(
        "llama4_text", **tiny.GROUPED, **HEAD, **SIZE, num_local_experts=6, intermediate_size=96, num_experts_per_tok=1
    ),
    "qwen3_5_text served": _config(
        "qwen3_5_text",
        **tiny.TRIPLES | HEAD | WIDE,
        linear_num_key_heads=3,
        linear_num_value_heads=6,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        layer_types=tiny.LINEAR["layer_types"],
    ),
    "deepseek_v2 served": _config("deepseek_v2", **WIDE, **LEAD | FED, **SIZED),
    "phimoe served": _config("phimoe", **tiny.GROUPED, **WIDE, num_local_experts=6, intermediate_size=96),
    "ernie4_5_moe served": _config(
        "ernie4_5_moe", **tiny.GROUPED, **HEAD, **SIZE, **FED, moe_num_experts=6, moe_k=2, moe_layer_start_index=0
    ),
    "granitemoe served": _config("granitemoe", **tiny.GROUPED, **WIDE, num_local_experts=6, intermediate_size=96),
    "mixtral served": _config("mixtral", **tiny.GROUPED, **HEAD, **SIZE, num_local_experts=6, intermediate_size=96),
}

PLANS: dict[str, Callable[[Width], list[Width]]] = {
    "channels": lambda full: [wide(full.kv_groups, full.heads_per_group, channels) for channels in (40, 66, 7)],
    "groups": lambda full: [wide(groups, full.heads_per_group, full.channels) for groups in (full.kv_groups - 1, 1)],
    "heads": lambda full: [wide(full.kv_groups, full.heads_per_group - 1, full.channels)],
    "gone": lambda full: [wide(0, 0, 24), wide(full.kv_groups, full.heads_per_group, 0), wide(1, 1, 66)],
    "empty": lambda full: [wide(0, 0, 0)],
    "experts": lambda full: [full | {EXPERTS: 5}],
    "experts' channels": lambda full: [full | {EXPERT_CHANNELS: full.channels // 2}],
}
"""Functions from the dense width to the widths of the first blocks; the other blocks stay dense."""


@dataclass(frozen=True)
class Case:
    """Pruned folder, and the settings with which vLLM runs it."""

    row: str
    plan: str | Width
    """Name of a plan with a width for each block, or the width of every block in the format `stock`."""
    intercept: bool = False
    dtype: str = "float32"
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        width = self.plan if isinstance(self.plan, str) else f"stock {self.plan.kv_groups}x{self.plan.heads_per_group}"
        more = ["intercept"] * self.intercept + [self.dtype] * (self.dtype != "float32") + [v for _, v in self.options]
        return " ".join([self.row, width, *more])


FOUR = wide(2, 3, 40)
BACKEND = (("model_impl", "transformers"),)
SERVED = [
    *(Case("llama", plan) for plan in PLANS if "experts" not in plan),
    Case("qwen3_moe served", "experts"),
    Case("llama", "gone", intercept=True),
    Case("llama", "gone", dtype="bfloat16"),
    *(Case(row, "gone") for row in ("mistral window", "qwen2", "qwen2 window", "qwen3", "gemma2", "gemma3_text")),
    *(Case(row, "gone") for row in ("phi3", "olmo2", "opt", "gpt_neox")),
    Case("llama", wide(2, 2, 40)),
    Case("llama every head", wide(5, 1, 40)),
    Case("qwen2", wide(2, 2, 40), options=BACKEND),
    Case("qwen2 window", wide(3, 2, 40), options=BACKEND),
    Case("qwen3", wide(3, 1, 40)),
    Case("phi3", wide(2, 2, 40)),
    Case("gpt2", wide(6, 1, 40)),
    Case("qwen3_moe served", wide(2, 2, 32, experts=5)),
    Case("mixtral served", wide(3, 1, 64, experts=4)),
    Case("llama4_text served", wide(3, 1, 96, experts=4)),
    # Checkpoints of these families name experts differently from transformers.
    *(Case(f"{name} served", "experts") for name in ("mixtral", "ernie4_5_moe", "granitemoe")),
    Case("glm4_moe served", wide(2, 2, 32, experts=5)),
    *(Case(row, plan) for row in ("gemma4_text served", "gemma4_text small served") for plan in ("channels", FOUR)),
    Case("gemma4_text mixture served", wide(2, 3, 32, experts=5)),
    # On a CPU vLLM computes linear attention in bfloat16.
    Case("qwen3_5_text served", wide(2, 3, 64), dtype="bfloat16"),
]
REFUSED = {
    Case("phimoe served", "experts"): "too many values to unpack",
    Case("deepseek_v2 served", "experts"): "Heterogeneous MLA models are not supported",
    Case("llama4_text served", "experts"): "must match the size of tensor b",
    Case("gpt2", "channels"): "not initialized from checkpoint.*c_attn.bias",
    Case("qwen2", wide(2, 2, 40)): "exceeds dimension size",
    Case("qwen2 window", wide(3, 2, 40)): "Sliding window for some but all layers is not supported",
}
"""Cases that vLLM refuses, with its message."""
WRONG = [
    # vLLM gives all experts one width, and leaves the rest of narrower ones uninitialised.
    Case("qwen3_moe served", "experts' channels"),
    Case("gemma4_text mixture served", "experts"),
]
"""Cases that vLLM opens and computes wrongly."""


def widths_by_block(case: Case, blocks: Sequence[Block]) -> dict[int, Width]:
    reference = next((block for block in blocks if block.loses_heads), blocks[0])
    full = reference.width
    plan = dict.fromkeys(range(len(blocks)), case.plan) if isinstance(case.plan, Width) else PLANS[case.plan](full)
    widths = plan if isinstance(plan, dict) else dict(enumerate(plan))
    if reference.heads_locked:
        own = {"kv_groups": full.kv_groups, "heads_per_group": full.heads_per_group}
        return {i: w | own if w.heads else w for i, w in widths.items()}
    return {i: width if blocks[i].loses_heads else own_axes(blocks[i], width) for i, width in widths.items()}


def write_case(case: Case, source: Path, folder: Path) -> None:
    """Prune the checkpoint of a row to the widths of a case."""
    blocks = blocks_of(build(case.row))
    keeps = {i: units_at(blocks[i], width) for i, width in widths_by_block(case, blocks).items()}
    noise = torch.randn(build(case.row).config.hidden_size, generator=torch.Generator().manual_seed(1))
    layers = [module.output_layer for module in blocks[0].modules] * case.intercept
    changed = {index: {f"{layer}.bias": 0.3 * noise for layer in layers} for index in keeps}
    write_pruned(source, folder, keeps, changed, "hf" if isinstance(case.plan, str) else "stock")


@dataclass(frozen=True)
class Expected:
    folder: Path
    ids: Tensor
    """Prompts with their continuations by transformers."""
    scores: Tensor
    """Log-likelihoods of all tokens but the first."""
    unsupported: str | None
    """Reason for which secateur says that vLLM cannot run the folder."""


def expect(case: Case, folder: Path) -> Expected:
    """Compute continuations and scores with transformers; only eager attention caps Gemma 2's attention logits."""
    with quiet(), torch.no_grad():
        config = open_checkpoint(folder).config
        model = model_class(config).from_pretrained(folder, attn_implementation="eager").eval()
        how = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 2}
        ids = model.generate(token_rows(2, PROMPT), do_sample=False, **how)
        scores = model(ids, use_cache=False).logits.log_softmax(-1)
    reason = vllm_unsupported(config, widths_of(config), per_layer=isinstance(case.plan, str))
    return Expected(folder, ids, scores[:, :-1].gather(-1, ids[:, 1:, None])[..., 0], reason)


@pytest.fixture(scope="module", autouse=True)
def trimmed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]], list[list[int]]]:
    """Folder with the tokens of Latin text; two texts, one of them in another script, as ids, and their continuations.

    As in `expected`, transformers runs before vLLM does.
    """
    whole, folder = (tmp_path_factory.mktemp("text") / name for name in ("whole", "trimmed"))
    file = save_tokenizer("gpt2", save("llama text", whole)) / "tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>")
    tokenizer.save_pretrained(whole)
    trim(whole, folder, vocabulary="latin")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.vocab_size < 901
    ids = [checkpoint.tokenizer().encode(SENTENCES[script][0])[:PROMPT] for script in ("latin", "greek")]
    with torch.no_grad():
        model = model_class(checkpoint.config).from_pretrained(folder).eval()
        how = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return folder, ids, [model.generate(torch.tensor([row]), **how)[0, len(row) :].tolist() for row in ids]


@pytest.fixture(scope="module")
def expected(checkpoint_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Expected]:
    """Compute all expected values before vLLM is used, since vLLM changes transformers' classes."""
    place, found = tmp_path_factory.mktemp("served"), {}
    for index, case in enumerate((*SERVED, *REFUSED, *WRONG)):
        folder = place / f"model{index}"
        write_case(case, checkpoint_folder(case.row), folder)
        found[case] = expect(case, folder)
    return found


@contextmanager
def opened(case: Case, folder: Path) -> Iterator[Any]:
    from vllm import LLM

    how = {"trust_remote_code": isinstance(case.plan, str), "max_model_len": 64, **dict(case.options)}
    yield LLM(str(folder), dtype=case.dtype, enforce_eager=True, **how)
    gc.collect()


def scored(model: Any, ids: Tensor) -> Tensor:
    """Return the log-likelihoods of all tokens but the first."""
    rows = model.generate(prompts(ids), sampling(1), use_tqdm=False)
    pairs = [zip(row.prompt_logprobs[1:], own[1:], strict=True) for row, own in zip(rows, ids.tolist(), strict=True)]
    return torch.tensor([[entry[token].logprob for entry, token in pair] for pair in pairs])


def greedy_continuations(model: Any, ids: Tensor) -> list[list[int]]:
    return [list(row.outputs[0].token_ids) for row in model.generate(prompts(ids), sampling(NEW), use_tqdm=False)]


def prompts(ids: Tensor) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": row} for row in ids.tolist()]


def sampling(tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, prompt_logprobs=0, ignore_eos=True)


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_vllm_computes_what_transformers_computes(expected, case):
    meant = expected[case]
    assert meant.unsupported is None or case.options
    with opened(case, meant.folder) as model:
        assert relative(scored(model, meant.ids), meant.scores) < TOLERANCE[case.dtype]
        if case.dtype == "float32":
            assert greedy_continuations(model, meant.ids[:, :PROMPT]) == meant.ids[:, PROMPT:].tolist()


def test_vllm_computes_and_encodes_with_a_trimmed_vocabulary(trimmed):
    from vllm import LLM

    folder, ids, continuations = trimmed
    model = LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=64)
    assert [list(model.get_tokenizer().encode(SENTENCES[script][0]))[:PROMPT] for script in ("latin", "greek")] == ids
    rows = model.generate([{"prompt_token_ids": row} for row in ids], sampling(NEW), use_tqdm=False)
    assert [list(row.outputs[0].token_ids) for row in rows] == continuations


def test_the_doctor_finds_that_vllm_runs_a_folder(expected):
    """The doctor starts vLLM in a separate process and compares its tokens with transformers'."""
    found = {engine.name: engine for engine in check_engines(expected[SERVED[0]].folder)}["vLLM"]
    assert (found.runs, found.message) == (True, "generates 8 tokens, 8 of them the same as transformers")


@pytest.mark.parametrize(("case", "message"), REFUSED.items(), ids=str)
def test_vllm_refuses_what_secateur_calls_unsupported(expected, case, message):
    """If this fails, vLLM has learned to run a case, and its unsupported reason must go."""
    folder = expected[case].folder
    assert expected[case].unsupported
    with pytest.raises((ValueError, RuntimeError, AssertionError), match=message), opened(case, folder) as model:
        scored(model, expected[case].ids)


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_vllm_computes_wrongly_what_secateur_calls_unsupported(expected, case):
    """If this fails, vLLM computes a case correctly, and its unsupported reason must go."""
    meant = expected[case]
    assert meant.unsupported
    with opened(case, meant.folder) as model:
        assert not relative(scored(model, meant.ids), meant.scores) < 0.01


def units_at(block: Block, width: Width) -> KeptUnits:
    """Return the first units of a block, and the first channels of each expert."""
    units, full = first_units(block, width), block.width
    if width.experts and width.channels < full.channels:
        fed = block.modules[-1]
        own = [full.channels * expert + channel for expert in units[fed.kind] for channel in range(width.channels)]
        shared = range(fed.shared_multiple * width.channels)
        units["channels"] = (*own, *(full.experts * full.channels + channel for channel in shared))
    return units


def test_the_example_runs(trimmed, tmp_path, monkeypatch, capsys):
    """The tiny model has few positions."""
    model, _, _ = trimmed
    script = Path(__file__).parents[2] / "examples" / "for_vllm.py"
    monkeypatch.setattr(secateur, "prune", partial(secateur.prune, samples=4, length=16), raising=False)
    monkeypatch.setattr(sys, "argv", [str(script), str(model), str(tmp_path / "out"), "--calibration", "random"])
    runpy.run_path(str(script))["main"](dtype="float32", enforce_eager=True, max_model_len=64)
    assert f"vllm serve {tmp_path / 'out'}" in capsys.readouterr().out
