"""Break the package in seeded places and see which tests notice.

    python tests/mutants.py --count=20 --seed=1

Each mutant changes one operator, comparison, truth value or number of one module, in a
copy of the checkout. The fast tests closest to the module are run on it, as
`find_tests.py` names them. A mutant that no test notices is printed with its line:
either a test is missing, or the change makes no difference. One takes half a minute.
"""

import argparse
import ast
import os
import pathlib
import random
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


def is_noticed(mutant: Mutant, checkout: pathlib.Path) -> bool:
    """Whether a test of the module fails on the mutant, in a copy of the checkout."""
    inside = mutant.module.relative_to(ROOT)
    name = mutant.module.relative_to(find_tests.PACKAGE).with_suffix("")
    found = find_tests.find(".".join(p for p in name.parts if p != "__init__"))
    files = [str(path.relative_to(ROOT)) for path in found[:MOST_FILES]]
    before = (checkout / inside).read_text("utf-8")
    (checkout / inside).write_text(mutant.source, "utf-8")
    try:
        finished = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-m", "fast", *files],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": str(checkout)},
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return True
    finally:
        (checkout / inside).write_text(before, "utf-8")
    return finished.returncode not in (0, 5)  # 5: no test was collected


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
    """Print the mutants that nothing noticed, and how many there were."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        checkout = pathlib.Path(folder, "checkout")
        ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "out")
        shutil.copytree(ROOT, checkout, ignore=ignored)
        for mutant in choose(options.count, options.seed):
            noticed = is_noticed(mutant, checkout)
            missed += not noticed
            word = "noticed" if noticed else "MISSED"
            print(f"{word} {mutant.module.relative_to(ROOT)}:{mutant.line}", flush=True)
    print(f"{options.count - missed} of {options.count} mutants were noticed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
