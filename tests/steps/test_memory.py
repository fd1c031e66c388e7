"""The memory limit of a run, and activations in files."""

import weakref
from pathlib import Path
from typing import Any

import pytest
from lives import bytes_of
from torch import Tensor

from outputs import assert_error
from secateur import BlockStream, Options, SecateurError, open_checkpoint, prune
from secateur.base import memory as amounts
from secateur.checkpoints.expert_matrices import ExpertMatrices
from secateur.checkpoints.stored import Stored
from secateur.model import arena
from secateur.steps import memory
from secateur.steps.memory import resident_bytes

ASKED: dict[str, Any] = {"calibration": "random", "samples": 24, "length": 24, "device": "cpu"}


def test_the_bound_moves_activations_to_files(checkpoint_folder, tmp_path, monkeypatch):
    """With the smallest possible limit all activations are in files, and the output stays the same."""
    made: list[Path | None] = []

    class Counted(arena.FileRows):
        def __init__(self, folder: Path | None, *given: Any):
            made.append(folder)
            super().__init__(folder, *given)

    monkeypatch.setattr(arena, "FileRows", Counted)
    monkeypatch.setattr(memory, "rss_bytes", lambda: 10**8)
    prune(checkpoint_folder("llama"), tmp_path / "roomy", **ASKED)
    assert not made
    stream = BlockStream(open_checkpoint(checkpoint_folder("llama")))
    least = 10**8 + resident_bytes(stream, Options())
    prune(checkpoint_folder("llama"), tmp_path / "narrow", **ASKED, memory=f"{least} B")
    assert len(made) > 20
    assert set(made) == {tmp_path / ".narrow.run"}
    assert bytes_of(tmp_path / "roomy") == bytes_of(tmp_path / "narrow")
    with pytest.raises(SecateurError, match=r"memory is \d+ B, but the largest block of .* needs .* GB; allow that"):
        prune(checkpoint_folder("llama"), tmp_path / "less", **ASKED, memory=f"{least - 1} B")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["narrow", "roomy"]


def test_experts_are_read_one_at_a_time_if_there_is_no_room(checkpoint_folder, tmp_path, monkeypatch):
    """Of the 8 experts of a block, old and new matrices of one or two are in memory, and the output stays the same."""
    matrices_of, living, most = Stored.expert_matrices, list[weakref.ref[Tensor]](), list[int]()

    def counted(self: Stored, name: str) -> ExpertMatrices:
        found = matrices_of(self, name)

        def read(expert: int) -> Tensor:
            living.append(weakref.ref(matrix := found.read(expert)))
            most.append(sum(one() is not None for one in living))
            return matrix

        return ExpertMatrices(found.shape, found.dtype, read)

    monkeypatch.setattr(Stored, "expert_matrices", counted)
    monkeypatch.setattr(memory, "rss_bytes", lambda: 10**8)
    model = checkpoint_folder("qwen3_moe")
    prune(model, tmp_path / "roomy", **ASKED)
    assert max(most) == 2 * 8
    most.clear()
    stream = BlockStream(open_checkpoint(model))
    # Half of the rows are resampled.
    least = 10**8 + resident_bytes(stream, Options(), 2 * ASKED["samples"] * ASKED["length"])
    prune(model, tmp_path / "narrow", **ASKED, memory=f"{least} B")
    assert max(most) <= 4
    assert bytes_of(tmp_path / "roomy") == bytes_of(tmp_path / "narrow")


@pytest.mark.parametrize("wrong", ["", "8", "lots", "8 parsecs", "-1GB", "8%GB", "101%", 10**9])
def test_an_invalid_amount_of_memory_is_refused(wrong):
    assert_error(r"memory is .*; write an amount with a unit such as 8GB, or 50%", amounts.parse_memory, wrong)


def test_amounts_of_memory(monkeypatch):
    monkeypatch.setattr(amounts, "available_bytes", lambda: 1000)
    assert [amounts.parse_memory(text) for text in ("8GB", "1 GiB", "25%", None)] == [8 * 10**9, 2**30, 250, 500]


def test_a_control_group_limits_the_free_memory(tmp_path, monkeypatch):
    machine = amounts.available_bytes()
    monkeypatch.setattr(amounts, "rss_bytes", lambda: 1000)
    for version, (_, file, used, cached) in zip(("second", "first"), [*amounts.LIMITS.values()], strict=True):
        version = tmp_path / version
        group = version / "outer" / "inner"
        group.mkdir(parents=True)
        (group / file).write_text("max\n")
        (group.parent / file).write_text("12345678\n")
        monkeypatch.setattr(amounts, "LIMITS", {"mine": (version, file, used, cached)})
        monkeypatch.setattr(amounts, "OWN_GROUPS", tmp_path / "groups")
        (tmp_path / "groups").write_text("7:others:/\n3:mine:/outer/inner\n")
        assert amounts.available_bytes() == 12345678 < machine
        (group.parent / used).write_text("3000\n")
        (group.parent / "memory.stat").write_text(f"anon 1500\n{cached} 500\n")
        assert amounts.available_bytes() == 12345678 - (3000 - 500 - 1000)


def test_the_default_takes_all_free_memory_if_half_is_too_little(checkpoint_folder, monkeypatch):
    stream = BlockStream(open_checkpoint(checkpoint_folder("llama")))
    monkeypatch.setattr(memory, "rss_bytes", lambda: 1000)
    least = 1000 + resident_bytes(stream, Options(effort="quick"))
    for module in (memory, amounts):
        monkeypatch.setattr(module, "available_bytes", lambda: least + 10)
    assert memory.memory_limit(stream, Options(effort="quick"), None) == (least, 0)
    for module in (memory, amounts):
        monkeypatch.setattr(module, "available_bytes", lambda: least - 1)
    with pytest.raises(SecateurError, match="GB of memory are free, but the largest block"):
        memory.memory_limit(stream, Options(effort="quick"), None)
