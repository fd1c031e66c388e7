"""Several processes write the same bytes as one, go on with what one began, and end together."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from member import LENGTH
from test_second_device import PRUNE, assert_alike, words_of
from typer.testing import CliRunner

from conftest import CheckpointFolder
from models import save, token_rows
from outputs import error_of, record_of
from secateur import SecateurError, open_model, prune
from secateur.base.errors import StoppedError
from secateur.base.launcher import process_place
from secateur.base.processes import Processes, connection_errors
from secateur.base.services import Services
from secateur.cli.app import app
from secateur.model.kinds import KINDS

pytestmark = pytest.mark.slow

SAMPLES = 19
"""Odd, and no multiple of a batch: one process has more rows than the other."""
IN_BFLOAT16 = {
    "latent attention": ("deepseek_v3", "--sparsity 0.3 --effort normal"),
    "linear attention": ("qwen3_next", "--sparsity 0.3 --effort normal"),
    "products in bfloat16": ("llama", "--effort best"),
}
"""Name → model, whose checkpoint is bfloat16, and the options of the command."""
CASES = [*PRUNE, *IN_BFLOAT16]
SIZES = {name: (1, 2 + at % 2) for at, name in enumerate(CASES)} | {"two fits": (1, 2, 3), "survey": (1, 2, 3)}
"""Numbers of processes of each case; two and three take turns, because each costs as much as all that one does."""
MEMBER = Path(__file__).with_name("member.py")
Case = dict[str, Any]
Together = Callable[[int, Sequence[Case]], list[tuple[int, str]]]
"""Function that runs cases in a number of processes, and returns the exit code and standard error of each."""


@pytest.fixture(scope="module")
def together() -> Iterator[Together]:
    """Return that function. A single process gets no variables of a launcher."""
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, str(MEMBER)], env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes) as parent:

        def ended(size: int, cases: Sequence[Case]) -> list[tuple[int, str]]:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            told = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            members = [{key: str(value) for key, value in (told | {"RANK": rank}).items()} for rank in range(size)]
            parent.stdin.write(json.dumps({"members": members if size > 1 else [{}], "cases": cases}) + "\n")
            parent.stdin.flush()
            return json.loads(parent.stdout.readline())

        yield ended
        parent.stdin.close()


def assert_same_units(out: Path, other: Path) -> None:
    """Assert that two retrained models keep the same units and have the same weights up to rounding."""
    records = [record_of(path) for path in (out, other)]
    kept = [[[block.get(kind) for kind in KINDS] for block in one["blocks"]] for one in records]
    assert kept[0] == kept[1]
    assert_alike(out, other)


def assert_same_bytes(out: Path, other: Path) -> None:
    """Assert that two pruned models keep the same units and have the same weights, bit by bit."""
    records = [record_of(path) for path in (out, other)]
    assert records[0]["blocks"] == records[1]["blocks"]
    found, wanted = ((path / "model.safetensors").read_bytes() for path in (out, other))
    assert found == wanted


class Done(NamedTuple):
    """Outputs of all cases, by one process, by two and by three."""

    place: Path
    common: list[str]
    models: dict[str, str]
    differing: list[tuple[int, str]]
    """Exit codes and errors of two processes with different options."""

    def words(self, name: str, out: str) -> list[str]:
        """Return the command of a case."""
        asked = IN_BFLOAT16[name][1].split() if name in IN_BFLOAT16 else words_of(name, self.place / "ratios.json")
        return ["prune", self.models[name], str(self.place / out), *self.common, *asked]

    def outputs(self, name: str) -> list[Path]:
        """Return the outputs of each number of processes."""
        return [self.place / f"{size} {name}" for size in SIZES[name]]


@pytest.fixture(scope="module")
def done(together: Together, checkpoint_folder: CheckpointFolder, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Run all cases, by one process, by two and by three."""
    place = tmp_path_factory.mktemp("teams")
    text = place / "text.txt"
    text.write_text(" ".join(f"w{token - 4}" for token in token_rows(1, 4000)[0].tolist()))
    common = ["--calibration", str(text), "--samples", str(SAMPLES), "--length", str(LENGTH)]
    models = {name: str(checkpoint_folder(model)) for name, (model, _) in PRUNE.items()}
    models |= {name: str(save(model, place / name, torch.bfloat16)) for name, (model, _) in IN_BFLOAT16.items()}
    done = Done(place, common, models, [])
    for size in (1, 2, 3):
        cases: list[Case] = [{"words": done.words(name, f"{size} {name}")} for name in CASES if size in SIZES[name]]
        cases.append({"words": ["survey", models["gradients"], "--out", str(place / f"{size} survey"), *common]})
        assert {code for code, _ in together(size, cases)} == {0}
    differing: Case = {"words": done.words("FLAP", "differing"), "own": {"1": {"words": ["--seed", "1"]}}}
    done.differing.extend(together(2, [differing]))
    return done


@pytest.mark.parametrize("name", CASES)
def test_any_number_of_processes_writes_the_same_bytes(done, name):
    one, *others = done.outputs(name)
    for other in others:
        assert_same_bytes(other, one)


def test_any_number_of_processes_measures_the_same_survey(done):
    one, *others = [(path / "survey.json").read_bytes() for path in done.outputs("survey")]
    assert others == [one, one]


def test_only_errors_of_a_connection_name_another_process():
    for error, named in (("[gloo/transport/tcp/pair.cc:547] Connection closed", True), ("shapes differ", False)):
        with pytest.raises(RuntimeError if not named else StoppedError) as caught, connection_errors():
            raise RuntimeError(error)
        assert ("another process of this run has stopped" in str(caught.value)) == named


def test_processes_with_different_options_are_refused(done):
    first, second = done.differing
    assert (first[0], second[0]) == (2, 2)
    assert first[1].splitlines()[-1].startswith("error: another process of this run has stopped")
    wanted = "error: process 1: seed is 1 here and 0 in process 0; give all processes the same options and files"
    assert second[1].splitlines()[-1] == wanted


def test_several_processes_leave_only_the_output(done):
    assert not [path.name for path in done.place.iterdir() if path.name.startswith(".") or "differing" in path.name]


def test_a_killed_process_ends_the_others_and_any_number_resume(done, together, checkpoint_folder):
    words = done.words("two fits", "out")
    state, out = done.place / ".out.run", done.place / "out"
    # One process alone is killed in its survey, behind the pass that rewrites rows.
    ((code, _),) = together(1, [{"words": words, "own": {"0": {"ends": 6}}}])
    assert code == -9
    assert (state / "resampled.json").exists()
    assert (state / "survey" / "behind-00002.activations").exists()
    # Two go on, and the second one is killed in the last block of the fit, when two blocks are written.
    begin = time.monotonic()
    (code, said), (killed, _) = together(2, [{"words": words, "own": {"1": {"ends": 4}}}])
    assert time.monotonic() - begin < 60
    assert (code, killed) == (2, -9)
    assert "Resuming a run that was stopped" in said
    assert said.splitlines()[-1].startswith("error: another process of this run has stopped: fix the error")
    assert "Traceback" not in said
    assert len(list(state.glob("fit-*/behind-00002.activations"))) == 1
    assert not out.exists()
    # One goes on once more.
    ((code, said),) = together(1, [{"words": words}])
    assert code == 0, said
    assert_same_bytes(out, done.place / "1 two fits")
    assert not state.exists()


def test_two_retrain_as_one_and_any_number_resume(together, checkpoint_folder, tmp_path):
    """One of two processes is killed while the teacher runs, or in a step; one process alone goes on."""
    text, model, plan = tmp_path / "text.txt", tmp_path / "model", tmp_path / "plan.json"
    text.write_text(" ".join(f"w{token - 4}" for token in token_rows(1, 4000)[0].tolist()))
    # The norm before the heads of block 1, which are removed, gets no gradient.
    plan.write_text('{"blocks": [{"block": 1, "width": {"kv_groups": 0, "heads_per_group": 0, "channels": 32}}]}')
    how = {"plan": str(plan), "samples": 8, "length": LENGTH, "effort": "quick"}
    prune(checkpoint_folder("llama"), model, calibration=str(text), **how)
    size = ["--length", str(LENGTH), "--batch", "4", "--tokens", "768", "--learning-rate", "1e-3", "--device", "cpu"]

    def words(out: str) -> list[str]:
        return ["retrain", str(model), str(tmp_path / out), "--calibration", str(text), *size]

    for count, out in ((1, "one"), (2, "two")):
        assert [code for code, _ in together(count, [{"words": words(out)}])] == [0] * count
    for out, end in (("teacher", {"ends": 2}), ("steps", {"step": 5})):
        (code, said), (killed, _) = together(2, [{"words": words(out), "own": {"1": end}}])
        assert (code, killed) == (2, -9)
        assert said.splitlines()[-1].startswith("error: another process of this run has stopped: fix the error")
        assert "Traceback" not in said
        assert not (tmp_path / out).exists()
        assert bool(list(tmp_path.glob(f".{out}.run/training/checkpoint-*"))) == (out == "steps")
        assert together(1, [{"words": words(out)}])[0][0] == 0
    # One process alone that is killed in a step goes on to the same bytes.
    assert together(1, [{"words": words("alone"), "own": {"0": {"step": 5}}}])[0][0] == -9
    assert together(1, [{"words": words("alone")}])[0][0] == 0
    alone, one = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("alone", "one"))
    assert alone == one
    wanted = record_of(tmp_path / "one")["retrained"][0]["losses"]
    assert len(wanted) == 8
    for out in ("two", "teacher", "steps"):
        assert record_of(tmp_path / out)["retrained"][0]["losses"] == pytest.approx(wanted, rel=1e-3)
        assert_same_units(tmp_path / out, tmp_path / "one")


def test_every_process_finds_the_output(together, checkpoint_folder, tmp_path):
    """Although one process writes it, a script goes on with it in all of them."""
    text, out = tmp_path / "text.txt", str(tmp_path / "out")
    text.write_text(" ".join(f"w{token - 4}" for token in token_rows(1, 2000)[0].tolist()))
    common = ["--calibration", str(text), "--length", str(LENGTH), "--device", "cpu"]
    prune_it = ["prune", str(checkpoint_folder("llama")), out, "--samples", "8", "--effort", "quick", *common]
    retrain_it = ["retrain", out, f"{out}2", "--batch", "2", "--tokens", "96", "--teacher", "none", *common]
    assert [code for code, _ in together(2, [{"words": prune_it}, {"words": retrain_it}])] == [0, 0]


def test_a_speed_target_needs_one_process(monkeypatch, checkpoint_folder):
    two = Services(Processes(0, 2))
    with pytest.raises(SecateurError, match=r"decode=1\.01x is a speed, which only a run with one process can measure"):
        open_model(checkpoint_folder("llama"), target="decode=1.01x", calibration="random", services=two)
    set_variables(monkeypatch)
    found = CliRunner().invoke(app, ["eval", str(checkpoint_folder("llama"))])
    assert str(found.exception).startswith(
        "eval runs in one process, but WORLD_SIZE is 2: unset WORLD_SIZE; only prune, survey and"
    )


def test_an_option_starts_the_processes(tmp_path, checkpoint_folder):
    """By torch's launcher, as torchrun does; one of them is killed at first."""
    words = ["prune", str(checkpoint_folder("llama")), str(tmp_path / "out"), "--calibration", "random"]
    words += ["--samples", str(SAMPLES), "--length", str(LENGTH), "--effort", "quick", "--processes", "2"]
    killing = tmp_path / "sitecustomize.py"
    killing.write_text('import os\nif os.environ.get("RANK") == "1":\n    os.kill(os.getpid(), 9)\n')
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])}
    for code in (2, 0):
        command = [sys.executable, "-m", "secateur", *words]
        found = subprocess.run(command, capture_output=True, text=True, env=os.environ | path)
        assert found.returncode == code, found.stderr
        killing.unlink(missing_ok=True)
        if code:
            assert found.stderr.splitlines()[-1].startswith("error: process 1 was ended by signal 9; if memory ran out")
            assert not (tmp_path / "out").exists()
    # One of them speaks.
    assert found.stdout.count("Written to") == 1
    assert found.stderr.count("Opened") == 1
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_number_of_processes_is_the_launchers(monkeypatch, checkpoint_folder, tmp_path):
    set_variables(monkeypatch)
    words = ["survey", str(checkpoint_folder("llama")), "--out", str(tmp_path / "out"), "--processes", "3"]
    found = CliRunner().invoke(app, words)
    assert str(found.exception) == "--processes is 3, but a launcher has started 2 processes: leave out --processes"


VARIABLES = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}
VARIABLES |= {"MASTER_ADDR": "here", "MASTER_PORT": "1"}


def set_variables(monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> None:
    for name, value in (VARIABLES | changes).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"MASTER_ADDR": None}, "WORLD_SIZE is 2, but MASTER_ADDR are not set; start all processes with torchrun"),
        ({"RANK": None, "MASTER_PORT": ""}, "but RANK and MASTER_PORT are not set"),
        ({"RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"RANK": "first"}, "RANK is 'first', which is not a whole number of at least 0"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1', which is not a whole number of at least 1"),
    ],
)
def test_incomplete_variables_of_a_launcher_are_refused(monkeypatch, changes, said):
    set_variables(monkeypatch, **changes)
    error = error_of(process_place)
    assert said in error
    assert "unset WORLD_SIZE" in error
