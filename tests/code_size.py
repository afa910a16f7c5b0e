"""Count the package's lines, its longest classes and its widest functions.

    python tests/code_size.py

The budgets are those of the redesign; `code_size_test.py` holds the tree to them.
"""

import ast
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "jaxtrain"

# Lines of all modules, kernels included.
# 25,200 after the redesign; the commands, their checks and their report came on top,
# what published models and data files bring along, and what survives damage; then
# fourteen families, layers of several kinds, and kernels of a recurrence; then mixtures
# of experts, over devices and under adapters, products in eight bits, and a loss head
# and attention of kernels of their own where none was; then what TRL's users bring;
# then a loss head that takes up its gradients on the way forward, steps whose layers
# share their kernels when they compile, and an embedding whose gradient is added up in
# a certain order on GPUs too; then kernels that compile beside their program, and
# adapters whose narrow matrices share a product; then gradients that GPUs share, laid
# out as weights are, and blocks that devices with a row in common list once; then
# refusals of what was read as something else: a split, a model, an empty file; then a
# head, and a log, that leave no GPU without work; then damage that is told before a
# run: weights that are no numbers, shards that are not there, another start, another
# config.json; then numbers that no step can count to, calls of tools and padding that
# rows tell of in others' ways, tokens that a model does not know; then weights that
# GPUs keep in parts, and what a fresh user found.
PACKAGE_BUDGET = 59_800
# The concerns that one reads to follow a DPO-LoRA run: losses and their options, step,
# state, adapters, the loop, and what builds them. 4,300 lines are the aim.
CORE = (
    "batch.py", "types.py", "step.py", "sharding.py", "loop.py", "build.py",
    "trainer.py", "model_manager.py", "models/load.py", "models/state.py",
    "run/feed.py", "objectives", "lora/adapters.py", "lora/targets.py",
    "record/diagnostics.py", "evaluation/held_out.py", "config/mesh_shape.py",
)  # fmt: skip
CORE_BUDGET = 4_800
LONGEST_CLASS = 300
# Outside kernels, where a call's shape is the hardware's.
WIDE = 8
MOST_WIDE_FUNCTIONS = 5


class Definition(NamedTuple):
    """A class or a function: its module, its name, and its lines or parameters."""

    path: str
    name: str
    size: int


def modules(part: str = "") -> list[pathlib.Path]:
    """The modules of the package, or of one of its files or folders."""
    path = PACKAGE / part
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def count_lines(*parts: str) -> int:
    """Lines of these files and folders, blank ones and comments included."""
    return sum(
        len(path.read_text("utf-8").splitlines())
        for part in parts
        for path in modules(part)
    )


def classes() -> list[Definition]:
    """Every class with its number of lines, the longest first."""
    found = [
        Definition(path, node.name, (node.end_lineno or 0) - node.lineno + 1)
        for path, node in _nodes()
        if isinstance(node, ast.ClassDef)
    ]
    return sorted(found, key=lambda definition: -definition.size)


def wide_functions() -> list[Definition]:
    """Functions with `WIDE` or more parameters, self excluded, outside kernels/."""
    found = [
        Definition(path, node.name, _count_parameters(node))
        for path, node in _nodes()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not path.startswith("kernels/")
    ]
    wide = [definition for definition in found if definition.size >= WIDE]
    return sorted(wide, key=lambda definition: -definition.size)


def _nodes() -> Iterator[tuple[str, ast.AST]]:
    for path in modules():
        relative = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            yield relative, node


def _count_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    named = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    bound = bool(named) and named[0].arg in ("self", "cls")
    rest = (node.args.vararg is not None) + (node.args.kwarg is not None)
    return len(named) + rest - bound


def main() -> None:
    """Print the counts, and the files that they are of."""
    print(f"package: {count_lines('')} lines (at most {PACKAGE_BUDGET})")
    print(f"core: {count_lines(*CORE)} lines (at most {CORE_BUDGET}):")
    for part in CORE:
        print(f"  {count_lines(part):5} {part}")
    print(f"longest classes (at most {LONGEST_CLASS} lines):")
    for path, name, size in classes()[:5]:
        print(f"  {size:5} {path} {name}")
    print(f"functions of {WIDE} or more parameters (at most {MOST_WIDE_FUNCTIONS}):")
    for path, name, size in wide_functions():
        print(f"  {size:5} {path} {name}")


if __name__ == "__main__":
    main()
