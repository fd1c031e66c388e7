"""Print the tests of what has changed, as arguments of pytest: `make check` runs them.

A change is everything that differs from the branch that this one follows (or from the last commit, if it follows none),
and every new file. `make check` runs one case of each parametrised test in the folders that a change touches, and all
cases of a changed family or page.
"""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
MATRIX = "tests/steps/test_matrix.py::test_masked_equals_sliced"
TESTS_OF = {
    "src/secateur/base": [
        "tests/base",
        "tests/write",
        "tests/cli/test_refused_options.py",
        "tests/cli/test_streams.py",
    ],
    "src/secateur/families": [MATRIX],
    "src/secateur/gguf": ["tests/formats"],
    "src/secateur/checkpoints": ["tests/checkpoints", MATRIX],
    "src/secateur/model": ["tests/model", MATRIX],
    "benchmarks": ["tests/criteria/test_flap.py"],
    "demo": ["tests/docs"],
    "paper": ["tests/paper"],
    "docs": ["tests/docs"],
    "README.md": ["tests/docs"],
}
"""Tests of folders whose tests are not in the folder of the same name in tests/."""
ALWAYS = [
    "tests/test_layout.py",
    "tests/test_project.py",
    "tests/docs/test_docs.py::test_examples_print_what_they_show",
]
ELSEWHERE = {"engines", "larger", "older", "serving"}
"""Folders of tests that need environments or time of their own."""


def git(*words: str) -> list[str]:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else []


def changed_files() -> list[str]:
    """Return the changed and the new files, as paths from the root of the repository."""
    base = git("merge-base", "HEAD", "@{upstream}") or ["HEAD"]
    return git("diff", "--name-only", base[0]) + git("ls-files", "--others", "--exclude-standard")


def paths_of(file: str) -> list[str]:
    """Return the files and folders of the tests of a file."""
    first, *rest = Path(file).parts
    if first == "tests":
        if len(rest) == 1 or rest[0] in ELSEWHERE:
            return []
        return [file if rest[-1].startswith("test_") else f"tests/{rest[0]}"]
    if first == "src" and len(rest) > 2:
        return TESTS_OF.get(f"src/secateur/{rest[1]}", [f"tests/{rest[1]}"])
    return TESTS_OF.get(first, [])


def arguments(files: list[str]) -> list[str]:
    """Return pytest's arguments for some changed files: names of cases, and paths, none inside another one."""
    paths = dict.fromkeys([*ALWAYS, *(path for file in files for path in paths_of(file))])
    there = [Path(path) for path in paths if (ROOT / path.partition("::")[0]).exists()]
    outermost = [str(path) for path in there if not any(other in path.parents for other in there)]
    families = [Path(file).stem for file in files if file.startswith("src/secateur/families/")]
    pages = [file for file in files if file.endswith(".md")]
    return [f"--few={','.join(families + pages)}", *outermost]


if __name__ == "__main__":
    print(*arguments(changed_files()))
