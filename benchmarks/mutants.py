"""Plant small errors in the source, one at a time, and count how many of them the tests find.

    pip install pytest-cov
    pytest -n auto --dist loadfile --cov secateur --cov-context test --cov-report= --junitxml junit.xml
    python benchmarks/mutants.py fit plan --count 120 --seed 0

The first test run records which tests reach which line, and how long they take. Then functions of fit/ and plan/ are
drawn at random, and one place in each. A mutant is the program with an error at this place: another comparison, sign,
constant or return value, `and` for `or`, a `not` or a statement less. The tests that reach the line run on the mutant,
quickest first, until one fails, at most for `--seconds`. Error messages, annotations, default values and
decorators are left out of the draw.

The script prints the source of each mutant and the test that found it. `--json FILE` keeps results; the mutants that
FILE holds are not run again. Mutants run in a copy of the repository, one at a time, each in a copy of a process that
has imported the program and the tests.
"""

import argparse
import ast
import gc
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import CodeType, FunctionType
from typing import Any, NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.In: "not in",
    ast.NotIn: "in",
    ast.Is: "is not",
    ast.IsNot: "is",
}
SIGNS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
}
MESSAGES = ("note", "busy", "stage", "describe")
"""Functions whose arguments are text for people."""


class Mutant(NamedTuple):
    """A change of the source: the characters from `start` to `end` of the file become `text`."""

    file: str
    line: int
    start: int
    end: int
    text: str

    def name(self) -> str:
        """Return the key of the mutant in a file of results."""
        return f"{self.file}:{self.line}:{self.start}-{self.end} {self.text}"

    def apply(self, source: bytes) -> bytes:
        """Return the changed source."""
        return source[: self.start] + self.text.encode() + source[self.end :]


def changes(node: ast.AST) -> Iterator[str]:
    """Yield the source of this node with one error."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in COMPARISONS:
            yield f"({ast.unparse(node.left)} {COMPARISONS[type(op)]} {ast.unparse(node.comparators[0])})"
        case ast.BinOp(left=left, op=op, right=right) if type(op) in SIGNS and not (is_text(left) or is_text(right)):
            yield f"({ast.unparse(ast.BinOp(left, SIGNS[type(op)](), right))})"
        case ast.BoolOp():
            yield f"({ast.unparse(ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values))})"
        case ast.UnaryOp(op=ast.Not()):
            yield f"({ast.unparse(node.operand)})"
        case ast.Constant(value=bool()):
            yield str(not node.value)
        case ast.Constant(value=int() | float() as value):
            yield repr(value + 1)
        case ast.Return(value=ast.AST() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield "return None"
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "pass"


def is_text(node: ast.AST) -> bool:
    """Return whether the node is text."""
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def mutated_parts(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the children of a node whose changes can matter to a program's result."""
    match node:
        case ast.Raise() | ast.JoinedStr() | ast.Assert():
            return
        case ast.Call(func=ast.Attribute(attr=name)) if name in MESSAGES:
            return
        case ast.FunctionDef(body=body):
            yield from body
        case ast.AnnAssign(value=value):
            if value is not None:
                yield value
        case ast.keyword(arg="strict" | "frozen"):
            return
        case _:
            yield from ast.iter_child_nodes(node)


def mutants_of(file: Path) -> Iterator[list[Mutant]]:
    """Yield the mutants of every function of a file."""
    source = file.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def of(node: ast.AST) -> Iterator[Mutant]:
        for part in mutated_parts(node):
            if isinstance(part, ast.FunctionDef | ast.ClassDef):
                continue
            if isinstance(part, ast.stmt | ast.expr):
                assert part.end_lineno is not None
                assert part.end_col_offset is not None
                start, end = (
                    starts[part.lineno - 1] + part.col_offset,
                    starts[part.end_lineno - 1] + part.end_col_offset,
                )
                for text in changes(part):
                    yield Mutant(str(file.relative_to(ROOT)), part.lineno, start, end, text)
            yield from of(part)

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and (found := list(of(node))):
            yield found


def draw(sources: list[str], count: int, seed: int) -> list[Mutant]:
    """Return mutants of different functions, each function of the sources with the same probability."""
    random = Random(seed)
    paths = [ROOT / "src" / "secateur" / name for name in sources]
    files = sorted(file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py")))
    functions = [found for file in files for found in mutants_of(file)]
    return [random.choice(found) for found in random.sample(functions, count)]


def test_seconds(junit: Path) -> dict[str, float]:
    """Return the time of each test."""
    cases = ElementTree.parse(junit).iter("testcase")
    return {
        f"{one.get('classname', '').replace('.', '/')}.py::{one.get('name')}": float(one.get("time", 0))
        for one in cases
    }


def set_up_seconds(seconds: dict[str, float]) -> dict[str, float]:
    """Return the time of each file's slowest test but one, as an estimate of what its tests share."""
    by_file: dict[str, list[float]] = {}
    for name, needed in seconds.items():
        by_file.setdefault(name.partition("::")[0], []).append(needed)
    return {file: sorted(times)[-2:][0] for file, times in by_file.items()}


def tests_of(
    mutant: Mutant, contexts: Any, seconds: dict[str, float], shared: dict[str, float], limit: float
) -> list[str]:
    """Return the tests that reach the line of a mutant, quickest first, at most for a number of seconds.

    The first test of a file is expected to take at least as long as `shared` says.
    """
    at = contexts.contexts_by_lineno(str(ROOT / mutant.file)).get(mutant.line, [])
    reached = {one.partition("|")[0] for one in at} & seconds.keys()
    total, chosen, files = 0.0, [], set[str]()
    for name in sorted(reached, key=lambda name: (shared[name.partition("::")[0]], seconds[name])):
        file = name.partition("::")[0]
        total += seconds[name] if file in files else max(seconds[name], shared[file])
        if total > limit:
            break
        files.add(file)
        chosen.append(name)
    return chosen


class FirstFailure:
    """Plugin of pytest that notes the first test that fails."""

    name: str | None = None

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note a failed test."""
        if report.failed and self.name is None:
            self.name = report.nodeid


class Mutants:
    """Plugin of pytest that, in place of one run of all tests, runs some tests on each mutant."""

    def __init__(self, args: argparse.Namespace, copy: Path):
        self.args, self.copy, self.first = args, copy, FirstFailure()
        self.results: dict[str, str | None] = {}

    def pytest_runtestloop(self, session: Any) -> bool:
        """Test all mutants; pytest has imported the tests and the program by now."""
        import coverage

        contexts, seconds = coverage.CoverageData(str(self.args.coverage)), test_seconds(self.args.junit)
        contexts.read()
        shared = set_up_seconds(seconds)
        session.config.pluginmanager.register(self.first)
        items = {item.nodeid: item for item in session.items}
        if self.args.json and self.args.json.exists():
            self.results = json.loads(self.args.json.read_text())
        mutants = draw(self.args.sources, self.args.count, self.args.seed)
        for mutant in mutants:
            name = mutant.name()
            if name not in self.results:
                tests = [
                    items[test]
                    for test in tests_of(mutant, contexts, seconds, shared, self.args.seconds)
                    if test in items
                ]
                self.results[name] = self.killed_by(mutant, tests, session) if tests else None
                if self.args.json:
                    self.args.json.write_text(json.dumps(self.results, indent=1))
            before = (ROOT / mutant.file).read_bytes()[mutant.start : mutant.end].decode()
            print(f"{mutant.file}:{mutant.line}  {before}  ->  {mutant.text}  |  {self.results[name]}", flush=True)
        killed = sum(self.results[mutant.name()] is not None for mutant in mutants)
        print(f"{killed} of {len(mutants)} killed ({killed / len(mutants):.0%})")
        return True

    def killed_by(self, mutant: Mutant, tests: list[Any], session: Any) -> str | None:
        """Run tests on a mutant, in a child process.

        Returns:
            The test that failed; "time" if the tests took ten times as long as allowed; None if all tests passed.
        """
        changed, failed = self.copy / mutant.file, self.copy / "failed.txt"
        source = (ROOT / mutant.file).read_bytes()
        # Tests that start processes of their own find the mutant in the file.
        changed.write_bytes(mutant.apply(source))
        failed.unlink(missing_ok=True)
        if (child := os.fork()) == 0:
            os.setsid()
            quiet = os.open(self.copy / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            try:
                plant(changed)
                for test, following in zip(tests, [*tests[1:], None], strict=True):
                    session.config.hook.pytest_runtest_protocol(item=test, nextitem=following)
                    if self.first.name:
                        failed.write_text(self.first.name)
                        break
                os._exit(0)
            finally:
                os._exit(1)
        try:
            return wait(child, 60 + 10 * self.args.seconds) or (failed.read_text() if failed.exists() else None)
        finally:
            changed.write_bytes(source)
            for path in session.config._tmp_path_factory.getbasetemp().iterdir():
                shutil.rmtree(path, ignore_errors=True)


def plant(file: Path) -> None:
    """Give all functions of a module that is imported already the code of its changed file."""

    def inside(code: CodeType) -> Iterator[CodeType]:
        yield code
        for one in code.co_consts:
            if isinstance(one, CodeType):
                yield from inside(one)

    codes = {(one.co_qualname, one.co_firstlineno): one for one in inside(compile(file.read_bytes(), file, "exec"))}
    for function in gc.get_objects():
        if isinstance(function, FunctionType) and function.__code__.co_filename == str(file):
            code = function.__code__
            function.__code__ = codes.get((code.co_qualname, code.co_firstlineno), code)


def wait(child: int, limit: float) -> str | None:
    """Wait for a child process, at most for a number of seconds; return how it ended, None if without an error."""
    ended = time.monotonic() + limit
    while time.monotonic() < ended:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return None if status == 0 else f"exit status {os.waitstatus_to_exitcode(status)}"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "time"


def absolute(path: str) -> Path:
    """Return the absolute path of an argument."""
    return Path(path).absolute()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", default=["."], help="files and folders of src/secateur; all if none")
    parser.add_argument("--count", type=int, default=120, help="number of mutants")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the draw")
    parser.add_argument("--coverage", type=absolute, default=ROOT / ".coverage", help="file that pytest-cov wrote")
    parser.add_argument("--junit", type=absolute, default=ROOT / "junit.xml", help="file that pytest wrote")
    parser.add_argument("--seconds", type=float, default=60, help="time of the tests of a mutant, without mutants")
    parser.add_argument("--json", type=absolute, help="file to keep results in")
    args = parser.parse_args()
    import pytest

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv*", ".git", "site", "out"))
        os.chdir(copy)
        sys.path.insert(0, str(copy / "src"))
        os.environ |= {"PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"}
        pytest.main(["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist"], plugins=[Mutants(args, copy)])


if __name__ == "__main__":
    main()
