"""Fuzz cases of `prune` with random combinations of options on a random family."""

import random
from pathlib import Path
from typing import Any

from bench import Bench
from right import compare, pruned

from models import MIXTURES, ROWS, SIMILAR
from secateur.criteria.registry import all_criteria

ORDERS = ("reap", "frequency", "heads=wanda,channels=flap-wifv", "similarity")
MODULES = (("heads",), ("channels",), ("experts",), ("heads", "channels"), ("experts", "channels"))
TARGETS = ("params=80%", "active=80%", "bytes=80%", "kv=75%", "ppl=1.2x")


def options(bench: Bench, rng: random.Random, at: Path) -> None:
    """Check that the written model computes what was fitted, or that the options are refused."""
    folder = bench.dense(rng.choice([*MIXTURES, *MIXTURES, *SIMILAR, *ROWS]))
    how = drawn(rng)
    recovery = "none" if how["recovery"] == "none" else "refit"
    compare(folder, at / "out", pruned(rng, folder, at / "out", **how), recovery)


def drawn(rng: random.Random) -> dict[str, Any]:
    """Return random options of `prune`."""

    def often(share: float) -> bool:
        return rng.random() < share

    how: dict[str, Any] = {"samples": rng.choice([4, 9]), "length": rng.choice([8, 16]), "seed": rng.randrange(3)}
    how |= {"dtype": "float32", "recovery": rng.choice(["refit", "refit", "none", "bias", "paper"])}
    how |= {
        "effort": rng.choice(["quick", "quick", "normal"]),
        "widths": rng.choice(["adaptive", "adaptive", "uniform"]),
    }
    how |= {"calibration": "self"} if often(0.2) else {}
    how |= {"criterion": rng.choice([*all_criteria(), *ORDERS])} if often(0.6) else {}
    how |= {"target": rng.choice(TARGETS)} if often(0.25) else {"sparsity": round(rng.uniform(0.05, 0.6), 2)}
    how |= {"modules": rng.choice(MODULES)} if often(0.3) else {}
    how |= {"ridge": rng.choice([0.0, 1e-3, 3.0])} if often(0.3) else {}
    how |= {"round": rng.choice([4, 8])} if often(0.1) else {}
    how |= {"blocks": rng.choice(["1:3", "2:3"]), "format": "hf"} if often(0.15) else {}
    how |= {"format": "stock", "widths": "uniform"} if often(0.2) else {}
    if how.get("criterion") == "similarity":
        how |= {"tau": rng.choice([0.1, 0.5])}
        del how["sparsity" if "sparsity" in how else "target"]
    if how.get("criterion") == "second-moment" and often(0.5):
        how["sigma"] = rng.choice(["random", "identity"])
    if how["recovery"] == "paper" and often(0.5):
        how["recover"] = rng.choice(["before", "after", "both"])
    if how["recovery"] != "none" and often(0.2):
        how["refit_samples"] = rng.choice([3, 8])
    return how
