"""Everything that takes `--device` stays on the device that it is given, and computes there what the CPU computes.

The device is `second_device.py`: torch's rules of one device an operation hold, and no GPU is needed.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from test_tasks import ITEMS, YAML
from torch.utils import backend_registration

from conftest import CheckpointFolder
from models import token_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this torch has no devices made in Python",
    ),
]

LENGTH = 16
ROUGH = "--criterion second-moment"
RATIOS = {"0:3": 0.3}
"""A third of every module is removed, so that no survey is needed: these cases are about other steps."""
PRUNE: dict[str, tuple[str, str]] = {
    "two fits": ("llama", "--effort best"),
    "modules beside each other": ("gpt_neox", "--effort quick"),
    "similar heads, norms behind": ("gemma3_text", "--criterion similarity --tau 0.16 --effort quick"),
    "its own text, layers in one tensor": ("phi3 wide", "--calibration self --effort quick --widths RATIOS"),
    "the paper's recovery, rows apart": (
        "llama biased",
        f"{ROUGH} --recovery paper --refit-samples 9 --recover before --widths RATIOS",
    ),
    "FLAP": ("opt", "--criterion flap-wifv --recovery bias --format hf --widths RATIOS"),
    "gradients": ("llama", "--criterion llm-pruner-element1 --widths uniform --recovery paper"),
    "random ids for the score, perplexity": ("llama", f"{ROUGH} --sigma random --target ppl=1.3x --effort quick"),
    "experts": ("qwen2_moe", "--sparsity 0.3 --effort quick"),
    "experts in groups": ("glm4_moe groups", "--samples 24 --widths RATIOS"),
    # Four rows are one batch: of two processes, one has none.
    "experts by norms": ("mixtral", "--sparsity 0.2 --modules experts --criterion reap --effort quick --samples 4"),
}
"""Name → model, and what is asked beside what all ask."""
CPU, SECOND, WITHOUT = DEVICES = ("cpu", "second", "second without float64")
SOME = (
    "FLAP",
    "two fits",
    "similar heads, norms behind",
    "the paper's recovery, rows apart",
    "experts",
    "survey",
    "eval",
)
"""Cases that run on a device without float64, too."""


def words_of(name: str, ratios: Path) -> list[str]:
    """Return the options of a case; the file of ratios is written."""
    ratios.write_text(json.dumps(RATIOS))
    return PRUNE[name][1].replace("RATIOS", str(ratios)).split()


class CarriedOut(NamedTuple):
    """Outcomes of command lines, each run on both devices."""

    place: Path
    outcomes: dict[str, str]
    """Error of each command line, by name; empty if there was none."""

    def both(self, name: str, device: str = SECOND) -> tuple[Path, Path]:
        """Return the outputs on a device and on the CPU; fail if there was an error."""
        assert not self.outcomes[name], self.outcomes[name]
        return self.place / f"{device} {name}", self.place / f"{CPU} {name}"


@pytest.fixture(scope="module")
def carried_out(checkpoint_folder: CheckpointFolder, tmp_path_factory: pytest.TempPathFactory) -> CarriedOut:
    place = tmp_path_factory.mktemp("devices")
    text = place / "text.txt"
    text.write_text(" ".join(f"w{token - 4}" for token in token_rows(1, 3000)[0].tolist()))
    (place / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    task = YAML.format(name="items", output="multiple_choice", file=place / "items.jsonl")
    (place / "items.yaml").write_text(task)
    common = ["--calibration", str(text), "--samples", "4", "--length", str(LENGTH)]
    dense = str(checkpoint_folder("llama"))
    cases = {}
    for name, (model, _) in PRUNE.items():
        words = [*common, *words_of(name, place / "ratios.json")]
        cases[name] = ["prune", str(checkpoint_folder(model)), str(place / f"{{device}} {name}"), *words]
    cases["survey"] = ["survey", dense, "--out", str(place / "{device} survey"), *common]
    cases["eval"] = ["eval", str(place / "cpu two fits"), "--against", dense, "--trust-remote-code", "--speed"]
    cases["eval"] += ["--perplexity", str(text), "--length", str(LENGTH), "--json", str(place / "{device} eval")]
    cases["eval"] += ["--tasks", "items", "--task-path", str(place)]
    cases["latency"] = ["prune", dense, str(place / "{device} latency"), *common, "--target", "decode=1.01x"]
    cases["latency"] += ["--effort", "quick"]
    script, outcomes = Path(__file__).parents[1] / "second_device.py", place / "outcomes.json"
    command = [sys.executable, str(script), str(outcomes)]
    given = [(words, DEVICES if name in SOME else (CPU, SECOND)) for name, words in cases.items()]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return CarriedOut(place, dict(zip(cases, json.loads(outcomes.read_text()), strict=True)))


def assert_alike(out: Path, other: Path) -> None:
    """Assert that two pruned models have the same weights up to rounding."""
    found, wanted = (load_file(path / "model.safetensors") for path in (out, other))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        # An intercept that is rounding alone has no size to be relative to.
        room = 1e-3 * float(value.float().abs().max()) + 1e-6
        torch.testing.assert_close(found[key], value, atol=room, rtol=0)


@pytest.mark.parametrize("name", PRUNE)
def test_a_second_device_prunes_alike(carried_out, name):
    for device in (SECOND, WITHOUT) if name in SOME else (SECOND,):
        assert_alike(*carried_out.both(name, device))


@pytest.mark.parametrize("device", [SECOND, WITHOUT])
def test_a_second_device_measures_the_same_errors(carried_out, device):
    found, wanted = (json.loads((path / "survey.json").read_text()) for path in carried_out.both("survey", device))
    assert len(found["curves"]) == len(wanted["curves"]) > 0
    for one, other in zip(found["curves"], wanted["curves"], strict=True):
        assert one["errors"] == pytest.approx(other["errors"], rel=1e-3, abs=1e-5 * other["energy"])


@pytest.mark.parametrize("device", [SECOND, WITHOUT])
def test_a_second_device_gives_the_same_figures(carried_out, device):
    found, wanted = (json.loads(path.read_text()) for path in carried_out.both("eval", device))
    assert len(found["models"]) == len(wanted["models"]) == 2
    for one, other in zip(found["models"], wanted["models"], strict=True):
        for text, score in other["texts"].items():
            assert one["texts"][text]["perplexity"] == pytest.approx(score["perplexity"], rel=1e-5)
        assert one["tasks"] == other["tasks"]
        assert one["speed"]["device"].startswith("second")


def test_a_second_device_meets_a_target_for_speed(carried_out):
    assert all((path / "config.json").exists() for path in carried_out.both("latency"))
