"""Break the package in seeded places and see which tests notice.

    python tests/mutants.py --count=20 --seed=1
    python tests/mutants.py --count=100 --processes=14 --before=main

Each mutant changes one operator, comparison, truth value or number of one module, in a
copy of the checkout. The fast tests closest to the module are run on it, as
`find_tests.py` names them (`--default`: the slower ones of them too). A mutant that no
test notices is printed with its line: either a test is missing, or the change makes no
difference. One takes half a minute.

`--before` compares the tests with earlier ones, from a git revision or a folder: the
mutants that today's tests miss are shown to these as well. A mutant that only the
earlier tests notice is printed as LOST, and the exit code is then 1.

A test that fails on the sound package too, for want of a package or a device, tells
nothing about a mutant. So the first one that fails is run once more without the change.
"""

import argparse
import ast
import concurrent.futures
import os
import pathlib
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import find_tests

ROOT = find_tests.TESTS.parent
_SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE,
    ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn,
    ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or,
    ast.Or: ast.And,
}  # fmt: skip
# Of a module's tests, how many files are run, and for how long.
MOST_FILES, SECONDS = 4, 300


class Mutant(NamedTuple):
    """A changed module: its source, and the line with the change."""

    module: pathlib.Path
    line: int
    source: str


def places(module: pathlib.Path) -> list[tuple[int, dict[str, Any]]]:
    """What can be changed in a module: a node by its number, and its new attributes."""
    nodes = enumerate(ast.walk(ast.parse(module.read_text("utf-8"))))
    return [(number, changed) for number, node in nodes for changed in _changes(node)]


def make(module: pathlib.Path, number: int, changed: dict[str, Any]) -> Mutant:
    """The mutant of one place."""
    tree = ast.parse(module.read_text("utf-8"))
    node = next(node for i, node in enumerate(ast.walk(tree)) if i == number)
    node.__dict__.update(changed)
    return Mutant(module, getattr(node, "lineno", 0), ast.unparse(tree))


def choose(count: int, seed: int) -> list[Mutant]:
    """Some mutants, each of a module drawn by its length."""
    draw = random.Random(seed)
    modules = sorted(find_tests.PACKAGE.rglob("*.py"))
    weights = [path.stat().st_size for path in modules]
    chosen: list[Mutant] = []
    while len(chosen) < count:
        (module,) = draw.choices(modules, weights)
        if found := places(module):
            chosen.append(make(module, *draw.choice(found)))
    return chosen


def test_files(mutant: Mutant) -> list[str]:
    """The test files closest to the mutant's module, from the repository's root."""
    name = mutant.module.relative_to(find_tests.PACKAGE).with_suffix("")
    found = find_tests.find(".".join(p for p in name.parts if p != "__init__"))
    return [str(path.relative_to(ROOT)) for path in found[:MOST_FILES]]


class Checkout:
    """A copy of the repository for one worker, whose package may be broken.

    Args:
        path: where the copy is made.
        tests: the folder of the tests to put there.
        marks: pytest's expression for the tests that are run.
        unsound: tests that fail on the sound package, which all workers share.
    """

    def __init__(
        self, path: pathlib.Path, tests: pathlib.Path, marks: str, unsound: set[str]
    ) -> None:
        self._path, self._marks, self._unsound = path, marks, unsound
        ignored = shutil.ignore_patterns(
            ".git", ".venv*", ".cache", "__pycache__", "out", "tests"
        )
        shutil.copytree(ROOT, path, ignore=ignored)
        shutil.copytree(tests, path / "tests")

    def notice(self, mutant: Mutant) -> str | None:
        """The name of a test that fails on the mutant alone, None if there is none."""
        files = [name for name in test_files(mutant) if (self._path / name).exists()]
        while True:
            failed = self._run(mutant, files)
            if failed is None or failed == "time" or self._run(None, [failed]) is None:
                return failed
            self._unsound.add(failed)

    def _run(self, mutant: Mutant | None, tests: list[str]) -> str | None:
        """The first test that fails, "time" if they take too long, None if all pass."""
        before = None
        if mutant is not None:
            broken = self._path / mutant.module.relative_to(ROOT)
            before = broken.read_text("utf-8")
            broken.write_text(mutant.source, "utf-8")
        try:
            return self._first_failure(tests)
        except subprocess.TimeoutExpired:
            return "time"
        finally:
            if before is not None:
                broken.write_text(before, "utf-8")

    def _first_failure(self, tests: list[str]) -> str | None:
        left_out = [f"--deselect={name}" for name in sorted(self._unsound)]
        files = [name for name in tests if name not in self._unsound]
        if not files:
            return None
        finished = subprocess.run(
            [
                sys.executable, "-m", "pytest", "-q", "-x", "-rfE", "--tb=no",
                "-m", self._marks, *left_out, *files,
            ],
            cwd=self._path,
            env=os.environ
            | {
                "PYTHONPATH": f"{self._path}:{os.environ.get('PYTHONPATH', '')}",
                "HF_HOME": str(self._path / ".cache" / "huggingface"),
            },
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )  # fmt: skip
        if finished.returncode in (0, 5):  # 5: no test was collected
            return None
        named = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", finished.stdout, re.M)
        return named[1] if named else files[0]  # pytest itself could not start


def judge(
    mutants: list[Mutant], today: "queue.Queue[Checkout]", earlier: Any
) -> Iterator[tuple[Mutant, str, str | None]]:
    """Each mutant with "noticed", "MISSED" or "LOST", and the test that noticed it.

    Args:
        today: the checkouts of today's tests, one for each mutant at a time.
        earlier: those of the earlier tests, None to compare with none.
    """

    def with_one(free: "queue.Queue[Checkout]", mutant: Mutant) -> str | None:
        checkout = free.get()
        try:
            return checkout.notice(mutant)
        finally:
            free.put(checkout)

    def one(mutant: Mutant) -> tuple[Mutant, str, str | None]:
        if (test := with_one(today, mutant)) is not None:
            return mutant, "noticed", test
        # Twice, for a test that fails now and then.
        tests = [with_one(earlier, mutant) for _ in range(2)] if earlier else [None]
        return mutant, "MISSED" if None in tests else "LOST", tests[-1]

    with concurrent.futures.ThreadPoolExecutor(today.qsize()) as pool:
        waiting = [pool.submit(one, mutant) for mutant in mutants]
        for done in concurrent.futures.as_completed(waiting):
            yield done.result()


def _earlier_tests(source: str, folder: pathlib.Path) -> pathlib.Path:
    """The folder of tests that `--before` names: a path, or of a git revision."""
    if pathlib.Path(source).is_dir():
        return pathlib.Path(source)
    archive = folder / "before.tar"
    command = ["git", "archive", f"--output={archive}", source, "tests"]
    subprocess.run(command, cwd=ROOT, check=True)
    shutil.unpack_archive(archive, folder / "before", filter="data")
    return folder / "before" / "tests"


def _changes(node: ast.AST) -> Iterator[dict[str, Any]]:
    """The attributes that make a mutant of a node."""
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in _SWAPS:
        yield {"op": _SWAPS[type(node.op)]()}
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPS:
        yield {"ops": [_SWAPS[type(node.ops[0])](), *node.ops[1:]]}
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield {"value": not node.value}
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield {"value": node.value + 1}


def main(arguments: list[str] | None = None) -> int:
    """Print what became of each mutant, and the sums; 1 if a mutant was lost."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="mutants at a time")
    parser.add_argument("--default", action="store_true", help="not only fast tests")
    parser.add_argument("--before", help="git revision or folder of earlier tests")
    options = parser.parse_args(arguments)
    marks = "not on_request" if options.default else "fast"
    mutants = choose(options.count, options.seed)
    words: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)

        def checkouts(kind: str, tests: pathlib.Path) -> "queue.Queue[Checkout]":
            made: queue.Queue[Checkout] = queue.Queue()
            unsound: set[str] = set()
            for number in range(options.processes):
                made.put(Checkout(folder / f"{kind}-{number}", tests, marks, unsound))
            return made

        earlier = None
        if options.before:
            earlier = checkouts("before", _earlier_tests(options.before, folder))
        for mutant, word, test in judge(
            mutants, checkouts("today", find_tests.TESTS), earlier
        ):
            place = f"{mutant.module.relative_to(ROOT)}:{mutant.line}"
            print(f"{word} {place} {test or ''}".rstrip(), flush=True)
            words.append(word)
    print(
        f"{words.count('noticed')} of {options.count} mutants were noticed,"
        f" {words.count('LOST')} by earlier tests alone"
    )
    return int("LOST" in words)


if __name__ == "__main__":
    sys.exit(main())
