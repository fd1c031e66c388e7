"""The Makefile, its help and requirements.lock agree; the wheel is complete."""

import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from changed import paths_of

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")


def variable(name: str) -> str:
    """Return the value of a variable of the Makefile."""
    found = re.search(rf"^{name} \??:?= (.+)$", MAKEFILE, re.MULTILINE)
    assert found, name
    return found[1]


def locked() -> dict[str, str]:
    return {canonicalize_name(name): version for name, version in re.findall(r"^(\S+)==(\S+)", LOCK, re.MULTILINE)}


def test_the_lock_is_names_and_hashes() -> None:
    """The lock has no URL and no option of pip, and every package has hashes."""
    comment, *lines = LOCK.removesuffix("\n").split("\n")
    assert comment.startswith("# Made by make lock")
    assert re.fullmatch(r"([a-z0-9-]+==[\w.]+( \\\n    --hash=sha256:[0-9a-f]{64})+\n?)+", "\n".join(lines))
    assert len(locked()) == len(re.findall("==", LOCK)) > 100


def test_the_lock_is_within_the_ranges() -> None:
    """The lock holds every requirement of the tests except torch."""
    wanted = [Requirement(text) for text in requires("secateur") or ()]
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": "test"})]
    wanted += [Requirement(variable(name)) for name in ("MODEL", "PEER")]
    versions = locked()
    assert {one.name for one in wanted if canonicalize_name(one.name) not in versions} == {"torch"}
    there = [one for one in wanted if one.name != "torch"]
    assert not [str(one) for one in there if versions[canonicalize_name(one.name)] not in one.specifier]
    assert not [name for name in versions if name.startswith(("torch", "nvidia-", "cuda-", "triton"))]


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in ROOT.glob("src/secateur/*/__init__.py")))
def test_make_check_finds_the_tests_of_every_folder(folder: str) -> None:
    paths = paths_of(f"src/secateur/{folder}/__init__.py")
    assert paths
    assert not [path for path in paths if not (ROOT / path.partition("::")[0]).exists()]


def test_the_wheel_prunes_without_the_repository(tmp_path: Path) -> None:
    """`make wheel` does the same in a fresh environment; here the other packages are those of the tests."""
    built, site, place = tmp_path / "built", tmp_path / "site", tmp_path / "place"
    place.mkdir()
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(built)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = built.iterdir()
    zipfile.ZipFile(wheel).extractall(site)
    command = [sys.executable, str(ROOT / "tests" / "wheel.py"), str(place)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(site / "secateur" / "__init__.py")
