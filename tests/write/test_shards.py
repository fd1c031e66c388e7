"""The output folder appears whole or not at all, and shards hold what was added."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from outputs import assert_error
from secateur import SecateurError
from secateur.base.errors import StoppedError
from secateur.base.files import held
from secateur.base.output import Output
from secateur.checkpoints.weights import list_tensors
from secateur.write.shards import ShardWriter, header_bytes_for


def tree(folder: Path) -> dict[str, str]:
    """Return every file below a folder with its contents, and every folder."""
    return {
        str(entry.relative_to(folder)): entry.read_text() if entry.is_file() else "/"
        for entry in sorted(folder.rglob("*"))
    }


def model_folder(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "model.safetensors").write_text("old")
    return path


def test_a_complete_folder_is_put_in_place(tmp_path):
    with Output(tmp_path / "out", source=tmp_path / "m") as partial:
        assert partial.parent == tmp_path
        assert partial.name.startswith(".out.partial-")
        (partial / "config.json").write_text("new")
        assert not (tmp_path / "out").exists()
    assert tree(tmp_path) == {"out": "/", "out/config.json": "new"}
    # Readable by others as the umask says, unlike what mkdtemp makes.
    plain = tmp_path / "plain"
    plain.mkdir()
    assert (tmp_path / "out").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("present", ["nothing", "empty folder", "model", "link to model", "link to itself"])
def test_an_output_replaces_only_what_it_may(tmp_path, present):
    place = tmp_path / "place"
    place.mkdir()
    target = place / "out"
    if present == "empty folder":
        target.mkdir()
    elif present == "model":
        model_folder(target)
    elif present == "link to model":
        target.symlink_to(model_folder(place / "real"))
    elif present == "link to itself":
        target.symlink_to(target)
    with Output(target, overwrite="model" in present) as partial:
        (partial / "config.json").write_text("new")
    files = {"config.json": "new"}
    assert tree(target) == files
    assert len(list(place.iterdir())) == (2 if present == "link to model" else 1)


def folder_with(place: Path, name: str, contents: str) -> None:
    (place / "out").mkdir()
    (place / "out" / name).write_text(contents)


REFUSALS = {
    "not empty": ({}, lambda at: model_folder(at / "out"), "exists and is not empty; choose another name or"),
    "a file": ({"overwrite": True}, lambda at: (at / "out").write_text("mine"), "a file with this name exists"),
    "other files": (
        {"overwrite": True},
        lambda at: folder_with(at, "thesis.txt", "mine"),
        "contains other files .thesis.txt",
    ),
    "other config": ({"overwrite": True}, lambda at: folder_with(at, "config.json", "{}"), "it is not a model folder"),
    "broken config": ({"overwrite": True}, lambda at: folder_with(at, "config.json", "{"), "it is not a model folder"),
    "a user's files": (
        {"overwrite": True},
        lambda at: [model_folder(at / "out").joinpath("train.py").touch(), (at / "out/notes.md").touch()],
        "other files .notes.md, train.py",
    ),
    "a training": (
        {"overwrite": True},
        lambda at: (model_folder(at / "out") / "run-5").mkdir(),
        "other files .run-5",
    ),
    "a link to the source": (
        {"overwrite": True, "source": "m"},
        lambda at: (at / "out").symlink_to(model_folder(at / "m")),
        "the folder of MODEL",
    ),
    "around the source": (
        {"overwrite": True, "source": "out/m"},
        lambda at: (model_folder(at / "out"), model_folder(at / "out" / "m")),
        "inside the folder of MODEL, or contains it",
    ),
    "inside the source": ({"source": "."}, lambda at: None, "inside the folder of MODEL, or contains it"),
    "no room": (
        {"expected_bytes": 10**18, "resume_path": "run"},
        lambda at: ((at / "run").mkdir(), (at / "run" / "first.safetensors").write_bytes(bytes(10**6))),
        r"needs 1,000,000,000,015.78 MB of disk space, but [\d.,]+",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_output_is_left_alone(tmp_path, case):
    options, prepare, message = REFUSALS[case]
    prepare(tmp_path)
    options = options | {name: tmp_path / options[name] for name in ("source", "resume_path") if name in options}
    before = tree(tmp_path)
    for attempt in (Output(tmp_path / "out", **options).check, Output(tmp_path / "out", **options).__enter__):
        assert_error(message, attempt)
        assert tree(tmp_path) == before


FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
        (ValueError("mine"), ValueError, "mine"),
        (OSError(errno.EIO, "Input/output error"), SecateurError, r"out: cannot be written \(Input/output error\)"),
        (OSError(errno.ENOSPC, "No space left on device"), SecateurError, "the disk is full; free some space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), SecateurError, "the disk is full"),
        (SafetensorError(FULL), SecateurError, "the disk is full"),
        (OSError("1114112 requested and 926624 written"), SecateurError, "the disk is full"),
        (SafetensorError("something else"), SafetensorError, "something else"),
    ],
)
@pytest.mark.parametrize("present", [False, True])
def test_an_error_leaves_the_old_output(tmp_path, error, raised, message, present):
    if present:
        model_folder(tmp_path / "out")
    before = tree(tmp_path)

    def run():
        with Output(tmp_path / "out", overwrite=present) as partial:
            write(partial / "shards", {"a": torch.ones(4), "b": torch.ones(4)}, 8)
            (partial / "config.json").write_text("half")
            raise error

    with pytest.raises(raised, match=message):
        run()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")])
def test_a_failed_swap_restores_the_old_output(tmp_path, monkeypatch, error):
    model_folder(tmp_path / "out")
    before = tree(tmp_path)
    rename = Path.rename

    def fail(self, target):
        if ".partial-" in self.name:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    expected = SecateurError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected), Output(tmp_path / "out", overwrite=True) as partial:
        (partial / "config.json").write_text("new")
    assert tree(tmp_path) == before


def test_what_a_killed_run_has_left_is_removed(tmp_path):
    left = tmp_path / ".out.partial-0123"
    left.mkdir()
    with held(left), Output(tmp_path / "out"):
        pass
    assert left.exists()
    with Output(tmp_path / "out", overwrite=True):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_file_created_meanwhile_is_not_overwritten(tmp_path):
    """A run that has worked until then is kept; with `SecateurError`, its state would be deleted."""
    with pytest.raises(StoppedError, match="not empty"), Output(tmp_path / "out"):
        model_folder(tmp_path / "out")
    assert tree(tmp_path / "out") == {"config.json": '{"model_type": "llama"}', "model.safetensors": "old"}
    assert len(list(tmp_path.iterdir())) == 1


def tensors(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"t{number:02d}.weight": torch.randn(10, 10, generator=generator) for number in range(count)}


def write(folder: Path, values: dict[str, torch.Tensor], limit: int) -> None:
    folder.mkdir()
    shards = ShardWriter(folder, header_bytes=header_bytes_for(values), limit_bytes=limit)
    for name, value in values.items():
        shards.add(name, value)
    shards.close()


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())


def test_many_shards_hold_every_tensor(tmp_path):
    values = dict(reversed(tensors(7).items())) | {"big": torch.ones(500)}
    write(tmp_path / "a", values, 800)
    shards = [f"model-{number:05d}-of-00005.safetensors" for number in range(1, 6)]
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [*shards, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 7 * 400 + 2000}
    assert list(index["weight_map"]) == sorted(values)
    assert equal({name: info.read() for name, info in list_tensors(tmp_path / "a").items()}, values)
    most = 800 + 8 + header_bytes_for(values)
    assert all(os.path.getsize(tmp_path / "a" / shard) <= most for shard in shards[:-1])


def test_views_and_shared_storage(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    values = {"t": whole.t(), "rows": whole[1:3], "columns": whole[:, ::2], "same": whole, "again": whole}
    values |= {"grad": torch.ones(2, requires_grad=True), "empty": torch.zeros(0, 3), "none": torch.zeros(0, 3)}
    write(tmp_path / "a", values, 10**6)
    assert equal(load_file(tmp_path / "a" / "model.safetensors"), values)


@pytest.mark.parametrize("count", [1, 50])
def test_the_reserved_header_is_large_enough(tmp_path, count):
    values = {f"{'long' * 20}.{i}": torch.ones(3, 5, dtype=torch.bfloat16) for i in range(count)}
    write(tmp_path / "a", values, 10**9)
    assert equal(load_file(tmp_path / "a" / "model.safetensors"), values)
    shards = ShardWriter(tmp_path, header_bytes=64)
    shards.add("a" * 100, torch.ones(1))
    with pytest.raises(ValueError, match="64 bytes were reserved"):
        shards.close()
