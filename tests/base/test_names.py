"""The tables of names are complete and need no torch; another package adds names by entry points."""

import os
import re
import subprocess
import sys
from importlib import import_module
from inspect import isabstract
from pathlib import Path
from typing import Any

import pytest

import secateur
from secateur.base.names import CRITERIA, FORMATS, LINEAGES, RECOVERIES, UNITS, find
from secateur.criteria.registry import Criterion
from secateur.fit.recovery import Recovery
from secateur.formats.format import Format

ROOT = Path(secateur.__file__).parent
PAGE = ROOT.parents[1] / "docs" / "extend.md"


def modules(folder: str) -> list[Any]:
    names = sorted({file.stem for file in (ROOT / folder).glob("[!_]*.py")} - {"registry", "entry"})
    return [import_module(f"secateur.{folder.replace('/', '.')}.{name}") for name in names]


def own_places(folders: str, kind: type) -> set[str]:
    """Return the places of all objects of a class, or concrete subclasses of it, that files of some folders define."""
    found = set()
    for module in (one for folder in folders.split() for one in modules(folder)):
        for name, one in vars(module).items():
            defined = isinstance(one, type) and issubclass(one, kind) and one.__module__ == module.__name__
            if isinstance(one, kind) or (defined and not isabstract(one)):
                found.add(f"{module.__name__}:{name}")
    return found


@pytest.mark.parametrize(
    ("places", "folder", "kind"),
    [
        (CRITERIA.values(), "criteria", Criterion),
        (RECOVERIES.values(), "fit", Recovery),
        ([one.place for one in FORMATS.values()], "formats gguf", Format),
    ],
)
def test_every_part_has_a_name(places, folder, kind):
    assert sorted(places) == sorted(own_places(folder, kind))
    assert all(find(one.place).declaration is one for one in FORMATS.values())


def test_every_file_of_families_and_units_is_listed():
    for table, folder, attribute in ((LINEAGES, "families", "FAMILIES"), (UNITS, "model/units", "describes")):
        assert sorted(table.values()) == [one.__name__ for one in modules(folder) if hasattr(one, attribute)]


USE = """
import sys
from secateur.steps.options import Options
import secateur.cli.app
Options(criterion="mean-square", recovery="unbiased", format="npz")
assert "torch" not in sys.modules
from secateur import prune
summary = prune(
    sys.argv[1], "out.npz", criterion="mean-square", recovery="unbiased", format="npz", calibration="random",
    samples=4, length=8,
)
assert summary.sparsity > 0.2
from secateur.families.registry import FAMILIES
from secateur.fit.recoveries import Refit
from secateur.fit.recovery import all_recoveries
assert FAMILIES["like_arcee"].gguf.architectures == ("arcee",)
assert all_recoveries()["refit"] is Refit
"""


def test_the_package_of_the_page_adds_its_names(tmp_path, checkpoint_folder):
    """The examples of docs/extend.md are the files of a package, as pip would install it."""
    text = PAGE.read_text()
    criterion, recovery, family, declared, npz, _ = re.findall(r"```python.*?\n(.*?)```", text, re.DOTALL)
    files = {
        "criterion": criterion,
        "recovery": recovery,
        "family": family.replace('"arcee": ', '"like_arcee": '),
        "declared": declared,
        "npz": npz,
    }
    (tmp_path / "my_package").mkdir()
    for name, code in files.items():
        (tmp_path / "my_package" / f"{name}.py").write_text(code)
    points = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
    assert points is not None
    points_text = re.sub(r'\[project.entry-points."(.+)"\]', r"[\1]", points[1]).replace('"', "")
    # A name of secateur's own keeps its meaning.
    points_text = points_text.replace("unbiased =", "refit = my_package.recovery:Unbiased\nunbiased =")
    info = tmp_path / "my_package-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1\n")
    (info / "entry_points.txt").write_text(points_text)
    path = os.pathsep.join([str(tmp_path), str(ROOT.parent)])
    done = subprocess.run(
        [sys.executable, "-c", USE, str(checkpoint_folder("llama"))],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.npz").stat().st_size > 0


BROKEN = """
import sys
import warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    from secateur.base.names import FORMATS
assert list(FORMATS) == ["hf", "stock", "gguf"]
assert "a format is left out: no_package:NPZ, an entry point, cannot be loaded" in str(seen[0].message)
from secateur.cli.app import main
sys.argv = ["secateur", "prune", "dense", "out", "--criterion", "lost"]
main()
"""


def test_a_broken_entry_point_is_one_line(tmp_path, checkpoint_folder):
    info = tmp_path / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    points = "[secateur.formats]\nnpz = no_package:NPZ\n[secateur.criteria]\nlost = json:lost\n"
    (info / "entry_points.txt").write_text(points)
    (tmp_path / "dense").symlink_to(checkpoint_folder("llama"))
    path = os.pathsep.join([str(tmp_path), str(ROOT.parent)])
    done = subprocess.run(
        [sys.executable, "-c", BROKEN],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "json:lost, an entry point, cannot be loaded" in done.stderr
    assert "Traceback" not in done.stderr
