"""Fixtures of the engines' tests: pruned folders of tiny models, loaded as users load them."""

import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# transformers reads both at import: no network, and a cache for the modeling files of folders.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": tempfile.mkdtemp(), "TOKENIZERS_PARALLELISM": "false"}

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import secateur
from models import GROUPED, ROWS, _config, save, token_rows
from secateur.base.quiet import quiet

# Widths that the kernels of quantised weights take.
SIZE = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
ROWS |= {
    "llama engines": _config("llama", **SIZE, intermediate_size=256),
    "qwen3_moe engines": _config("qwen3_moe", **GROUPED | SIZE, **EXPERTS),
}
LLAMA, MIXTURE = "llama engines", "qwen3_moe engines"
PLANS: dict[tuple[str, str], list[dict[str, int]]] = {
    (LLAMA, "stock"): [{"heads": 4, "channels": 160}] * 3,
    # The first block has no heads, the second no channels, and the third few of both.
    (LLAMA, "hf"): [{"heads": 0, "channels": 192}, {"heads": 8, "channels": 0}, {"heads": 2, "channels": 96}],
    (MIXTURE, "stock"): [{"heads": 4, "experts": 5}] * 3,
    (MIXTURE, "hf"): [{"heads": 8, "experts": 6}, {"heads": 0, "experts": 4}, {"heads": 2, "experts": 8}],
}
"""Number of units that each block keeps, by row and format."""
DENSE = [LLAMA, MIXTURE]
CASES = list(PLANS)

Case = tuple[str, str]
Folders = Callable[[Case], Path]


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    """Return the row and the format of a pruned folder; each test runs with all."""
    return request.param


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Return a function from a case to its pruned or dense folder, which tests must not change."""
    place = tmp_path_factory.mktemp("engines")
    made: dict[Case, Path] = {}

    def folder(case: Case) -> Path:
        if case not in made:
            row, format = case
            out = place / "-".join(case).replace(" ", "-")
            if format == "dense":
                save(row, out)
            else:
                prune(folder((row, "dense")), out, format, PLANS[case])
            made[case] = out
        return made[case]

    return folder


def prune(source: Path, out: Path, format: str, counts: list[dict[str, int]], **more: Any) -> None:
    """Prune a model so that each block keeps its first units."""
    blocks = [{"block": i, **{kind: list(range(n)) for kind, n in own.items()}} for i, own in enumerate(counts)]
    plan = out.with_suffix(".json")
    plan.write_text(json.dumps({"blocks": blocks}))
    how = {"calibration": "random", "samples": 8, "length": 16, "effort": "quick"}
    secateur.prune(source, out, plan=plan, format=format, **how | more)


def load(folder: Path, **how: Any) -> Any:
    """Load a folder as its model card says, with its own modeling file."""
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **how).eval()


def logits(model: Any, ids: Tensor | None = None, **how: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS if ids is None else ids, **how).logits.float()


def apart(found: Tensor, expected: Tensor) -> float:
    """Return the mean deviation relative to the mean size, as a router's close choice may change a single token."""
    return float((found - expected).abs().mean() / expected.abs().mean())


IDS = token_rows(2, 24)


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Train on the same rows in each step, and return the losses before the steps."""
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    gc.collect()
