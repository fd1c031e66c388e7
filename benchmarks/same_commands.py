"""Commands that same.py runs: every lineage, criterion, recovery, format and target on tiny models.

A case has a name and the commands that run one after the other in an empty folder. In that folder `dense` holds the
models and `files` the texts and other inputs, both written once by `prepare`.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
ROWS = "--samples 8 --length 16"
RANDOM = f"--calibration random {ROWS}"
TEXT = f"--calibration files/text.txt {ROWS}"


@dataclass(frozen=True)
class Case:
    """Commands that run in one folder, without the word secateur."""

    commands: tuple[str, ...]
    processes: int = 1
    """Number of processes that share the work, as torchrun starts them."""
    killed: bool = False
    """Whether the first process is killed in the middle, and a second one resumes."""


LINEAGES = (
    *("llama", "llama biased", "llama tied", "mistral window", "qwen2 window", "qwen3 biased", "gemma", "gemma2"),
    *("gemma3_text", "phi3", "phi3 wide", "gpt2", "gpt_neox", "gpt_neox serial", "gptj", "opt", "opt after", "bloom"),
    *("falcon", "falcon new", "falcon old", "mpt", "glm", "glm4", "granite", "olmo", "olmo2", "cohere", "cohere2"),
    *("stablelm beside", "nemotron", "phi", "smollm3", "starcoder2", "apertus", "hunyuan_v1_dense", "exaone4"),
    *("lfm2", "qwen3_5_text", "gemma4_text", "gemma4_text small", "gemma4_text wide", "youtu", "youtu plain"),
)
MIXTURES = (
    *("mixtral", "qwen2_moe", "qwen2_moe some", "qwen3_moe", "gpt_oss", "llama4_text", "qwen3_next", "deepseek_v2"),
    *("deepseek_v3", "deepseek_v3 plain", "glm4_moe", "gemma4_text mixture", "granitemoe", "minimax_m2", "phimoe"),
    *("ernie4_5_moe", "hunyuan_v1_moe", "lfm2_moe", "dots1", "mistral4"),
)
MULTIMODAL = ("gemma3", "gemma4 small", "mistral3", "qwen3_vl_moe")
CRITERIA = (
    *("surgeon", "second-moment", "wanda", "flap-wifv", "flap-ifv", "flap-wifn", "l1", "l2", "random"),
    *("llm-pruner-vector", "llm-pruner-element1", "llm-pruner-element2", "similarity --tau 0.15"),
    *("similarity+wanda --tau 0.1", "similarity+surgeon --tau 0.15", "heads=wanda,channels=l2"),
)
RECOVERIES = {
    "none": "--recovery none",
    "bias": "--recovery bias",
    "quick": "--effort quick",
    "quick without ridge": "--effort quick --ridge 0",
    "best": "--effort best",
    "paper": "--recovery paper --criterion second-moment",
    "paper before": "--recovery paper --recover before --criterion second-moment",
    "paper both": "--recovery paper --recover both --criterion second-moment",
}
RECOVERED = ("llama", "gemma2", "gpt2", "gpt_neox", "opt after", "qwen2_moe")
"""Rows of tests/models.py that are pruned with every recovery."""
LLAMA = {
    "sigma identity": f"--criterion second-moment --sigma identity {RANDOM}",
    "sigma random": f"--criterion second-moment --sigma random --recovery paper {TEXT}",
    "ridge": f"--ridge 2 {RANDOM}",
    "refit calibration": f"{TEXT} --refit-calibration files/documents.jsonl --refit-samples 12",
    "refit samples": f"--refit-samples 8 --effort quick {RANDOM}",
    "self": f"--calibration self {ROWS}",
    "general": f"--calibration general {ROWS}",
    "general and text": f"--calibration general+files/text.txt {ROWS}",
    "documents": f"--calibration files/documents.jsonl {ROWS} --seed 3",
    "params": f"--target params=85% {RANDOM}",
    "bytes": f"--target bytes=0.2MB {RANDOM}",
    "kv": f"--target kv=70% {RANDOM}",
    "ppl": f"--target ppl=1.2x --effort quick {TEXT}",
    "heads": f"--modules heads {RANDOM}",
    "channels": f"--modules channels --round 8 {RANDOM}",
    "blocks": f"--blocks 1:3 {RANDOM}",
    "ratios": f"--widths files/ratios.json --effort quick {RANDOM}",
    "uniform": f"--widths uniform {RANDOM}",
    "bfloat16": f"--dtype bfloat16 --effort quick {RANDOM}",
    "longer text": "--calibration files/text.txt --samples 12 --length 48",
}
EXPERTS = {
    "whole": "--sparsity 0.3 --modules experts",
    "whole, quick": "--sparsity 0.3 --modules experts --effort quick",
    "whole, uniform": "--sparsity 0.3 --modules experts --widths uniform",
    "thinned": "--sparsity 0.3 --modules channels",
    "thinned, no recovery": "--sparsity 0.3 --modules channels --recovery none",
    "thinned, quick": "--sparsity 0.3 --modules channels --effort quick",
    "thinned, uniform": "--sparsity 0.3 --modules channels --widths uniform",
    "active": "--target active=80%",
    "best": "--sparsity 0.3 --effort best",
    "wanda": "--sparsity 0.3 --criterion wanda --effort quick",
    "random": "--sparsity 0.3 --criterion random --effort quick",
}
TWO_STEPS = {
    "plan": (f"plan dense/llama --out plan.json {RANDOM}", f"prune dense/llama out --plan plan.json {RANDOM}"),
    "plan of experts": (
        f"plan dense/qwen2_moe --sparsity 0.4 --out plan.json {RANDOM}",
        f"prune dense/qwen2_moe out --plan plan.json --effort quick {RANDOM}",
    ),
    "exact record": (
        f"prune dense/gemma2 first --recovery none --criterion l2 {RANDOM}",
        f"prune dense/gemma2 out --plan first/secateur.json {RANDOM}",
    ),
    "exact record of experts": (
        f"prune dense/mixtral first --recovery none --criterion wanda --sparsity 0.4 {RANDOM}",
        f"prune dense/mixtral out --plan first/secateur.json --effort quick {RANDOM}",
    ),
    "survey": (
        f"survey dense/llama --out survey {TEXT}",
        f"prune dense/llama out --survey survey/survey.json --sparsity 0.5 {TEXT}",
    ),
    "survey of experts": (f"survey dense/mixtral --out survey {RANDOM}",),
    "survey of a parallel block": (f"survey dense/gpt_neox --out survey {RANDOM}",),
    "sizes": (f"sizes dense/llama --out out --sparsities .2,.4 --perplexity files/held.txt --tokens 320 {TEXT}",),
    "retrain": (
        f"prune dense/llama pruned --effort quick {TEXT}",
        "retrain pruned adapters --calibration files/text.txt --tokens 512 --length 16 --batch 4 --rank 2 "
        "--teacher none",
        "retrain pruned weights --calibration files/text.txt --tokens 512 --length 16 --batch 4 --teacher dense/llama",
    ),
    "export": (
        f"prune dense/llama pruned --widths uniform --modules channels --round 32 --effort quick {RANDOM}",
        *(f"export pruned {kind}.gguf --type {kind}" for kind in ("f32", "bf16", "q8_0", "q4_0")),
        f"prune f32.gguf out --sparsity 0.1 --effort quick {RANDOM}",
    ),
    "evaluation": (
        f"prune dense/llama out --effort quick {RANDOM}",
        "eval out --against dense/llama --perplexity files/held.txt --tokens 320 --length 16 --report --json out.json",
    ),
    "vocabulary of scripts": (
        *(f"trim dense/tokens-{kind} {kind} --vocabulary latin+greek" for kind in ("gemma", "llama3", "unigram")),
        f"prune dense/tokens-qwen out --vocabulary cyrillic --effort quick {RANDOM}",
        "trim dense/tokens-qwen wrong --vocabulary klingon",
    ),
    "vocabulary of a text": (
        f"prune dense/tokens-gemma out --vocabulary 60% --calibration files/latin.txt --effort quick {ROWS}",
        "trim out again --vocabulary text:5 --calibration files/latin.txt --length 16",
        "retrain out healed --calibration files/latin.txt --tokens 512 --length 16 --batch 4 --rank 2",
        "trim dense/tokens-qwen qwen --vocabulary text --calibration files/latin.txt --length 16",
        "trim dense/tokens-unigram unigram --vocabulary 200 --calibration files/latin.txt --length 16",
    ),
    "chats": (f"prune dense/chat out --calibration files/chats.jsonl --effort quick {ROWS}",),
    "families": ("families",),
    "family file": (f"prune dense/biogpt out --family files/biogpt.yaml --recovery none {RANDOM}",),
    "mistakes": (
        "prune dense/llama out --sparsity 2",
        "prune dense/llama out --criterion similarity",
        "prune dense/biogpt out --calibration random",
        "prune dense/mixtral out.gguf --format gguf",
    ),
}
TYPES = {
    "q8_0": "--format gguf --type q8_0 --widths uniform --round 32",
    "f32": "--format gguf --type f32 --widths uniform",
    "per layer": "--format gguf --round 32",
}
BIOGPT = """
model_type: biogpt
blocks: biogpt.layers
output: out_proj
feed_forward: null
up: fc1
gate: null
down: fc2
final_norm: biogpt.layer_norm
ungrouped: true
stock: {head_counts: dense, theta_key: null}
"""
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def folder_of(row: str) -> str:
    return f"dense/{row.replace(' ', '-')}"


def tiny_cases() -> dict[str, Case]:
    """Return the cases on tiny models by name; cases with several processes come first."""
    words: dict[str, str] = {}
    for row in (*LINEAGES, *MIXTURES):
        words[f"hf {row}"] = f"{folder_of(row)} out --sparsity 0.4 {RANDOM}"
        plain = f"--widths uniform --sparsity 0.3 --recovery none --criterion l2 {RANDOM}"
        words[f"stock {row}"] = f"{folder_of(row)} out {plain}"
        words[f"gguf {row}"] = f"{folder_of(row)} out.gguf --format gguf {plain}"
    for row in MULTIMODAL:
        words[f"multimodal {row}"] = f"dense/image-{row.replace(' ', '-')} out --effort quick {RANDOM}"
    for criterion in CRITERIA:
        for row in ("llama", "qwen2_moe"):
            words[f"criterion {criterion}, {row}"] = f"dense/{row} out --criterion {criterion} --effort quick {TEXT}"
    for row in RECOVERED:
        for name, options in RECOVERIES.items():
            words[f"recovery {name}, {row}"] = f"{folder_of(row)} out {options} {RANDOM}"
    for name, options in LLAMA.items():
        words[f"llama with {name}"] = f"dense/llama out {options}"
    for row in ("mixtral", "qwen2_moe", "gemma4_text mixture"):
        for name, options in EXPERTS.items():
            words[f"experts {name}, {row}"] = f"{folder_of(row)} out {options} {RANDOM}"
    for row in ("llama", "qwen3 biased", "gpt2", "gemma4_text"):
        for name, options in TYPES.items():
            words[f"gguf type {name}, {row}"] = f"{folder_of(row)} out.gguf {options} --effort quick {RANDOM}"
    together = {
        f"two processes, {row}": Case((f"prune {folder_of(row)} out --effort {effort} {RANDOM}",), processes=2)
        for row, effort in (("llama", "normal"), ("mixtral", "quick"))
    }
    cases = {name: Case((f"prune {one}",)) for name, one in words.items()}
    cases |= {name: Case(commands) for name, commands in TWO_STEPS.items()}
    killed = {
        f"killed, {row}": Case((f"prune {folder_of(row)} out {RANDOM}",), killed=True) for row in ("llama", "qwen2_moe")
    }
    return together | cases | killed


def real_cases(text: bool) -> dict[str, Case]:
    """Return the cases on SmolLM2, calibrated on `files/real.txt` or on the text that the package ships."""
    source = "files/real.txt" if text else "general"
    rows = f"--sparsity 0.25 --calibration {source} --samples 16 --length 128"
    return {
        f"real {effort}": Case((f"prune dense/smollm2.gguf out --effort {effort} {rows}",))
        for effort in ("quick", "normal")
    }


def prepare(folder: Path, text: Path | None) -> None:
    """Write the models and input files of all cases; models that are there stay."""
    files, dense = folder / "files", folder / "dense"
    for place in (files, dense):
        place.mkdir(parents=True, exist_ok=True)
    if text:
        shutil.copyfile(text, files / "real.txt")
    words = [f"w{(7 * i * i + 3 * i) % 11}" for i in range(2000)]
    texts = [" ".join(words[at : at + 40]) for at in range(0, 1000, 40)]
    (files / "text.txt").write_text("\n\n".join(texts))
    (files / "held.txt").write_text(" ".join(words[1000:]))
    (files / "documents.jsonl").write_text("".join(json.dumps({"text": f"{one}!"}) + "\n" for one in texts))
    chats = [{"messages": [{"role": "user", "content": one}]} for one in texts]
    (files / "chats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in chats))
    (files / "ratios.json").write_text('{"0:1": 0.2, "1:3": {"heads": 0, "channels": 0.4}}')
    (files / "biogpt.yaml").write_text(BIOGPT)
    _save_models(dense, files / "latin.txt")


def _save_models(dense: Path, latin: Path) -> None:
    """Save each row of the tests with a byte-level tokenizer, which a GGUF file can hold too, and models to trim."""
    sys.path[:0] = [str(TESTS), str(TESTS / "formats")]
    import test_multimodal
    from transformers import AutoConfig

    import models
    import tiny_tokenizers

    models.SIMILAR["biogpt"] = lambda: AutoConfig.for_model("biogpt", **models.SIZES)
    rows = {folder_of(row): row for row in (*LINEAGES, *MIXTURES, "biogpt")} | {"dense/chat": "llama"}
    for place, row in rows.items():
        saved = dense.parent / place
        if not saved.exists():
            models.save(row, saved)
            tokenizer = models.make_letters()
            tokenizer.chat_template = TEMPLATE if place == "dense/chat" else None
            tokenizer.save_pretrained(saved)
    for row in MULTIMODAL:
        if not (saved := dense / f"image-{row.replace(' ', '-')}").exists():
            test_multimodal.save(row, saved)
    latin.write_text(" ".join(tiny_tokenizers.SENTENCES["latin"]) * 60, encoding="utf-8")
    models.SIMILAR["tokens"] = lambda: AutoConfig.for_model("llama", **(models.SIZES | {"vocab_size": 1024}))
    for kind in ("gemma", "llama3", "qwen", "unigram"):
        if not (saved := dense / f"tokens-{kind}").exists():
            tiny_tokenizers.save_tokenizer(kind, models.save("tokens", saved))
