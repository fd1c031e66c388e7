"""Fuzz cases by number: a damaged input of some kind, given to the library or to the command line.

A case must end in a right result or in `SecateurError`, within seconds and in little memory, and must leave no partial
output. Where possible the expected result comes from elsewhere: transformers' reading of the damaged folder, the
safetensors library, or the bytes of a run that was never stopped.
"""

import json
import math
import random
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import safetensors
import torch
from bench import BIOGPT, NEVER, SMALL, TEXT, Bench
from mutate import changed, damaged, damaged_file, damaged_header, spelled
from right import TOLERANCE, Fault, Skipped, command, compare, limits, loaded, pruned
from transformers import AutoConfig

from models import MIXTURES, ROWS, SIMILAR, logits_of, make_tokenizer, relative, save, token_rows
from secateur import (
    SecateurError,
    calibration_rows,
    draw_rows,
    open_checkpoint,
    open_model,
    plan_widths,
    prune,
    retrain,
    survey_model,
    trim,
)
from secateur.criteria.registry import all_criteria
from secateur.families.registry import FAMILIES
from secateur.gguf.export import export
from secateur.measure.evaluation import evaluate
from secateur.retraining.options import Training
from secateur.vocabulary.kept import original_ids

CONFIGS = ("llama", "llama biased", "mistral window", "gpt2", "gemma2", "phi3", "opt", "qwen3_moe")
"""Rows whose config.json is damaged."""
# One function for each kind of input. `at` is the folder of the case: its input is at/in, its output at/out.


def weights(bench: Bench, rng: random.Random, at: Path) -> None:
    """Damage a safetensors file."""
    folder = shutil.copytree(bench.tiny, at / "in")
    file = folder / "model.safetensors"
    if rng.random() < 0.5:
        damaged_header(rng, file)
    else:
        file.write_bytes(damaged(rng, file.read_bytes(), 2500))
    _opened(rng, folder, at)


def index(bench: Bench, rng: random.Random, at: Path) -> None:
    """Damage the index of shards, or a shard."""
    folder = shutil.copytree(bench.shards, at / "in")
    if rng.random() < 0.7:
        damaged_file(rng, folder / "model.safetensors.index.json")
    else:
        file = rng.choice(sorted(folder.glob("*.safetensors")))
        file.unlink() if rng.random() < 0.2 else damaged_header(rng, file)
    _opened(rng, folder, at)


def _opened(rng: random.Random, folder: Path, at: Path) -> None:
    """Compare all tensors with those that the safetensors library reads; prune some of the models."""
    checkpoint = open_checkpoint(folder)
    fingerprint = checkpoint.fingerprint
    assert fingerprint
    seen = {}
    for file in {info.file for whole in checkpoint.tensors.values() for info in whole.parts}:
        with safetensors.safe_open(file, "pt") as stored:
            seen |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    for name in checkpoint.tensors:
        mine = checkpoint.read(name)
        assert mine.dtype == seen[name].dtype, name
        assert torch.equal(mine.view(-1).view(torch.uint8), seen[name].reshape(-1).view(torch.uint8)), name
    if rng.random() < 0.3:
        recovery = rng.choice(["none", "refit"])
        compare(folder, at / "out", pruned(rng, folder, at / "out", recovery=recovery), recovery)


def config(bench: Bench, rng: random.Random, at: Path) -> None:
    """Damage config.json or generation_config.json."""
    folder = shutil.copytree(bench.dense(rng.choice(CONFIGS)), at / "in")
    damaged_file(rng, folder / ("config.json" if rng.random() < 0.9 else "generation_config.json"))
    recovery = rng.choice(["none", "refit"])
    how: dict[str, Any] = {"recovery": recovery, "widths": rng.choice(["adaptive", "uniform"])}
    compare(folder, at / "out", pruned(rng, folder, at / "out", **how), recovery)


def tokenizer(bench: Bench, rng: random.Random, at: Path) -> None:
    """Damage tokenizer.json or tokenizer_config.json."""
    folder = shutil.copytree(rng.choice([bench.tiny, bench.letters]), at / "in")
    damaged_file(rng, folder / rng.choice(["tokenizer.json", "tokenizer.json", "tokenizer_config.json"]))
    if rng.random() < 0.2:
        pruned(rng, folder, at / "out", calibration=str(bench.text), recovery="none")
        loaded(at / "out")
        return
    checkpoint = open_checkpoint(folder)
    assert _rows(checkpoint.tokenizer(), bench.text).shape == (4, 8)


def trimmed(bench: Bench, rng: random.Random, at: Path) -> None:
    """Damage a file of the tokenizer, then remove tokens; the others keep their rows of the embedding."""
    folder = shutil.copytree(bench.scripts(rng.choice(["gpt2", "llama2", "unigram_bytes"])), at / "in")
    damaged_file(rng, folder / rng.choice(["tokenizer.json", "tokenizer.json", "tokenizer_config.json"]))
    trim(folder, at / "out", vocabulary=rng.choice(["text", "text:2", "latin"]), calibration=str(bench.text), length=16)
    dense, cut = open_checkpoint(folder), open_checkpoint(at / "out")
    name = "model.embed_tokens.weight"
    assert torch.equal(cut.read(name), dense.read(name)[original_ids(cut)])
    # A damaged length would be compared with the number of tokens.
    assert max(cut.tokenizer().backend_tokenizer.encode(TEXT).ids) < cut.config.vocab_size
    loaded(at / "out")


def _rows(words: Any, source: Path) -> Any:
    found = calibration_rows(words, str(source), samples=4, length=8, seed=0, vocab_size=128)
    assert 0 <= int(found.min()) <= int(found.max()) < 128
    return found


def rows(bench: Bench, rng: random.Random, at: Path) -> None:
    """Damage a file of calibration text."""
    template = "{% for one in messages %}{{ one.role }} {{ one.content }} {% endfor %}"
    words = make_tokenizer(
        bos=rng.random() < 0.5, template=rng.choice([template, template, None, "{{ messages[9].x }}"])
    )
    if rng.random() < 0.3:
        file = at / "in.txt"
        file.write_bytes(damaged(rng, TEXT.encode()))
    else:
        file, entry = at / "in.jsonl", {"messages": [{"role": "user", "content": TEXT}]}
        entries = [changed(rng, rng.choice([entry, {"text": TEXT}]), times=1) for _ in range(rng.randint(1, 3))]
        whole = "\n".join(map(spelled, entries)).encode("utf-8", "surrogatepass")
        file.write_bytes(damaged(rng, whole) if rng.random() < 0.3 else whole)
    assert _rows(words, file).shape == (4, 8)


def gguf(bench: Bench, rng: random.Random, at: Path) -> None:
    """Damage a GGUF file."""
    file = at / "in.gguf"
    file.write_bytes(damaged(rng, bench.gguf.read_bytes(), rng.choice([64, 1200, 8000])))
    with patch.dict("os.environ", {"XDG_CACHE_HOME": str(at / "cache")}):
        try:
            checkpoint = open_checkpoint(file, dtype=torch.float32)
            checkpoint.tokenizer()
            loaded(checkpoint.path)
            if rng.random() < 0.3:
                pruned(rng, file, at / "out", recovery="none")
                loaded(at / "out")
        finally:
            kept = list((at / "cache").glob("secateur/.*"))
            shutil.rmtree(at / "cache", ignore_errors=True)
    assert not kept, kept


def plan(bench: Bench, rng: random.Random, at: Path) -> None:
    """A plan, or ratios for ranges of blocks."""
    file, out = at / "in.json", at / "out"
    recovery = rng.choice(["none", "refit"])
    if rng.random() < 0.4:
        # An intact plan, or almost.
        blocks = [_units(rng, index) for index in rng.sample(range(2), rng.choice([1, 2, 2]))]
        file.write_text(json.dumps({"blocks": blocks}))
        compare(bench.tiny, out, pruned(rng, bench.tiny, out, plan=str(file), recovery=recovery), recovery)
        return
    if rng.random() < 0.3:
        file.write_text(json.dumps(rng.choice([{"0:2": 0.25}, {"0:1": {"heads": 0.5, "channels": 0.1}, "1:2": 0.2}])))
        how = {"widths": str(file)}
    else:
        record = json.loads((bench.pruned("adaptive") / "secateur.json").read_text())
        entries = [{key: one[key] for key in ("block", "width", "heads", "channels")} for one in record["blocks"]]
        for entry in entries if rng.random() < 0.5 else ():
            del entry["heads"], entry["channels"]
        file.write_text(json.dumps({"blocks": entries, "fingerprint": record.get("fingerprint")}))
        how = {"plan": str(file)}
    damaged_file(rng, file)
    compare(bench.tiny, out, pruned(rng, bench.tiny, out, **how, recovery=recovery), recovery)


def _units(rng: random.Random, index: int) -> dict[str, Any]:
    """Return a plan's entry of a block: random units, or a random width."""
    groups = rng.sample(range(2), rng.choice([0, 1, 2]))
    heads = [2 * group + head for group in groups for head in rng.sample(range(2), rng.choice([1, 2, 2]))]
    channels = rng.sample(range(24), rng.choice([0, 1, 5, 24]))
    if rng.random() < 0.7:
        return {"block": index, "heads": heads, "channels": channels}
    each = rng.choice([0, 1, 2, 2])
    return {"block": index, "width": {"kv_groups": len(groups), "heads_per_group": each, "channels": len(channels)}}


def survey(bench: Bench, rng: random.Random, at: Path) -> None:
    """Damage a survey file."""
    file = shutil.copy(bench.survey, at / "in.json")
    damaged_file(rng, Path(file))
    run = open_model(bench.tiny, **SMALL, survey=Path(file))
    drawn = draw_rows(run)
    decided = plan_widths(run, drawn, survey_model(run, drawn))
    assert 0.2 < decided.sparsity < 0.5, decided


def state(bench: Bench, rng: random.Random, at: Path) -> None:
    """Damage the run folder of a run that was stopped."""
    kept = shutil.copytree(bench.stopped(rng.choice([1, 2, 4, 5])), at / ".out.run")
    files = sorted(file for file in kept.rglob("*") if file.is_file() and file.name != "lock")
    for file in rng.sample(files, min(len(files), rng.choice([1, 1, 2]))):
        what = rng.random()
        if what < 0.2:
            file.unlink()
        elif what < 0.4 and file.suffix == ".json":
            damaged_file(rng, file)
        else:
            file.write_bytes(damaged(rng, file.read_bytes()))
    try:
        prune(bench.tiny, at / "out", **SMALL)
    except SecateurError:
        # The run folder stays, for the user to decide on.
        shutil.rmtree(kept, ignore_errors=True)
        raise
    whole = bench.stopped(NEVER).with_name(f"stopped-{NEVER}")
    for file in whole.rglob("*"):
        if file.is_file() and file.name != "timings.json":
            assert file.read_bytes() == (at / "out" / file.relative_to(whole)).read_bytes(), file.name


def family(bench: Bench, rng: random.Random, at: Path) -> None:
    """Damage a family file."""
    model, file = bench.biogpt, at / "in.yaml"
    what = rng.random()
    if what < 0.2:
        file.write_text(
            spelled(BIOGPT | rng.choice([{"heads_locked": "no"}, {"queries": "q_proj"}, {"norm_offset": False}]))
        )
    elif what < 0.9:
        file.write_text(spelled(changed(rng, BIOGPT)), errors="surrogatepass")
    else:
        file.write_bytes(damaged(rng, bench.described.read_bytes()))
    with patch.dict(FAMILIES):
        blocks = pruned(rng, model, at / "out", family=file, recovery="none")
        compare(model, at / "out", blocks, "none")


def _folder(bench: Bench, rng: random.Random, at: Path) -> Path:
    """Return a pruned folder with one damaged file."""
    folder = shutil.copytree(bench.pruned(rng.choice(["adaptive", "uniform"])), at / "in")
    name = rng.choice(["config.json", "config.json", "secateur.json", "generation_config.json", "model.safetensors"])
    if name == "model.safetensors":
        damaged_header(rng, folder / name)
    else:
        damaged_file(rng, folder / name)
    return folder


def evaluated(bench: Bench, rng: random.Random, at: Path) -> None:
    """Evaluate a damaged pruned folder."""
    folder = _folder(bench, rng, at)
    if rng.random() < 0.2:
        more = ("--report", "--against", bench.letters) if rng.random() < 0.7 else ()
        command("eval", folder, "--perplexity", bench.text, "--length", "8", "--tokens", "64", *more)
        return
    assert evaluate(str(folder), texts=[str(bench.text)], length=8, tokens=64).models[0].parameters > 0


def exported(bench: Bench, rng: random.Random, at: Path) -> None:
    """Export a damaged pruned folder, and compare the folder with the file, both read by transformers."""
    folder, out = _folder(bench, rng, at), at / "out.gguf"
    found = export(folder, out, type="f32")
    out.rename(at / "in.gguf")
    if found.architecture != "llama":
        return
    with patch.dict("os.environ", {"XDG_CACHE_HOME": str(at / "cache")}):
        try:
            again = open_checkpoint(at / "in.gguf", dtype=torch.float32)
            ids = token_rows(2, 6)
            difference = relative(logits_of(loaded(again.path), ids), logits_of(loaded(folder), ids))
        finally:
            shutil.rmtree(at / "cache", ignore_errors=True)
    if not (difference < TOLERANCE or math.isnan(difference)):
        raise Fault(f"logits differ by {difference:.2e}")


def retrained(bench: Bench, rng: random.Random, at: Path) -> None:
    """Retrain a damaged pruned folder."""
    folder = _folder(bench, rng, at)
    how: dict[str, Any] = {"tokens": "16", "length": 8, "batch": 2, "rank": rng.choice([0, 2]), "teacher": "none"}
    retrain(folder, at / "out", Training(calibration=str(bench.text), **how), device="cpu")
    loaded(at / "out")


def model(bench: Bench, rng: random.Random, at: Path) -> None:
    """Prune a model of a random family with random sizes."""
    name = rng.choice(sorted(ROWS | SIMILAR | MIXTURES))
    sizes = (ROWS | SIMILAR | MIXTURES)[name]().to_dict()
    made = resized(rng, sizes)
    folder = at / "in"
    try:
        config = AutoConfig.for_model(**made)
        with patch.dict(ROWS, {name: lambda: config}):
            save(name, folder)
        logits_of(loaded(folder), token_rows(2, 6))
    except Exception:
        # The class does not accept these sizes.
        raise Skipped from None
    recovery = rng.choice(["none", "refit"])
    how: dict[str, Any] = {"recovery": recovery, "widths": rng.choice(["adaptive", "uniform"])}
    how["sparsity"] = rng.choice([0.1, 0.25, 0.4])
    compare(folder, at / "out", pruned(rng, folder, at / "out", **how), recovery)


def resized(rng: random.Random, sizes: dict[str, Any]) -> dict[str, Any]:
    """Return a config with random widths and depth."""
    made = {key: value for key, value in sizes.items() if value is not None and key != "transformers_version"}
    made["dtype"] = "float32"

    def put(value: int, *keys: str) -> None:
        for key in keys:
            if isinstance(made.get(key), int) and not isinstance(made.get(key), bool):
                made[key] = value

    groups = rng.choice([1, 2, 3, 4])
    heads = groups * rng.choice([1, 1, 2, 3])
    grouped = made.get("num_key_value_heads") not in (None, made.get("num_attention_heads"))
    put(heads, "num_attention_heads", "n_head", "n_heads")
    put(groups if grouped else heads, "num_key_value_heads")
    put(heads * rng.choice([4, 6, 8]), "hidden_size", "n_embd", "d_model")
    put(rng.choice([4, 6, 8, 10, 16]), "head_dim")
    put(rng.choice([5, 16, 31, 64, 100]), "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    put(rng.choice([8, 20, 24]), "moe_intermediate_size")
    put(rng.choice([128, 131, 200]), "vocab_size")
    if rng.random() < 0.5 and "layer_types" not in made:
        put(rng.choice([1, 2, 4]), "num_hidden_layers", "n_layer", "n_layers")
        for key in ("mlp_layer_types", "no_rope_layers", "moe_layers", "moe_topk"):
            made.pop(key, None)
    return made


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


KINDS: dict[str, tuple[int, Callable[[Bench, random.Random, Path], None]]] = {
    "safetensors": (10, weights),
    "index": (6, index),
    "config": (10, config),
    "tokenizer": (7, tokenizer),
    "trim": (3, trimmed),
    "rows": (7, rows),
    "gguf": (7, gguf),
    "plan": (7, plan),
    "survey": (5, survey),
    "state": (6, state),
    "family": (13, family),
    "eval": (6, evaluated),
    "export": (5, exported),
    "retrain": (2, retrained),
    "model": (3, model),
    "options": (3, options),
}
"""Number of cases of each kind in a hundred, and the function of the kind."""
ORDER = [kind for kind, (weight, _) in KINDS.items() for _ in range(weight)]
random.Random(0).shuffle(ORDER)
assert len(ORDER) == 100


def kind_of(number: int) -> str:
    return ORDER[number % len(ORDER)]


def run(bench: Bench, number: int) -> str:
    """Run a case and return `right`, `refused` or `no model`; raise `Fault` with its number for anything else."""
    kind, rng = kind_of(number), random.Random(number)
    at = Path(tempfile.mkdtemp(prefix=f"case-{number}-", dir=bench.place))
    why = ""
    try:
        with limits():
            KINDS[kind][1](bench, rng, at)
        end = "right"
    except SecateurError as error:
        end, why = "refused", str(error)
    except Skipped:
        end = "no model"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        lines = (f"  {one.filename}:{one.lineno}: {one.line}" for one in traceback.extract_tb(error.__traceback__))
        trace = "\n".join(line for line in lines if "site-packages/torch" not in line)
        raise Fault(f"case {number} ({kind}): {type(error).__name__}: {str(error)[:300]}\n{trace}") from None
    finally:
        left = sorted(file.name for file in at.iterdir() if not file.name.startswith("in"))
        shutil.rmtree(at, ignore_errors=True)
    if left not in ([], ["out"]) or (end == "refused" and left):
        # A written output may be refused when it is compared.
        raise Fault(f"case {number} ({kind}): {end}, and these files are left: {left} ({why})")
    if end == "refused" and not (why.strip() and len(why) < 3000):
        raise Fault(f"case {number} ({kind}): refused in {len(why)} characters: {why[:200]}")
    return end
