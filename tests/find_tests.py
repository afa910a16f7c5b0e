"""Which test files test a module, the closest first.

    python tests/find_tests.py jaxtrain/data/rows/columns.py

Closest is a file of the module's name (`columns_test.py`), or of the name of a folder
that it lies in (`checkpoint_test.py`); then come the files that import the module,
those that import few others first; and where there is none, the tests of the modules
which import it, or for a command those that name it.
"""

import ast
import functools
import pathlib
import sys

TESTS = pathlib.Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "jaxtrain"


def find(module: str) -> list[pathlib.Path]:
    """The test files of a module, such as "data.rows.columns", below the package."""
    named = [
        path
        for part in reversed(module.split("."))  # its own name, then its folders'
        for path in sorted(files(), key=lambda path: len(path.parts))
        if path.stem == f"{part}_test"
    ]
    direct = [
        path for path in files() if module in imported(path) and path not in named
    ]
    direct.sort(key=lambda path: len(imported(path)))
    others = direct or _through_users(module) or _mentioning(module)
    return [*named, *(path for path in others if path not in named)]


def _through_users(module: str) -> list[pathlib.Path]:
    """The tests of the modules that import it, or of those that import these."""
    seen, users = {module}, {module}
    while users:
        users = {m for m in modules() if users & _imported_by_module(m)} - seen
        seen |= users
        found = {path for path in files() if users & imported(path)}
        if found:
            return sorted(found, key=lambda path: len(imported(path)))
    return []


def _mentioning(module: str) -> list[pathlib.Path]:
    """The tests of a command, which is imported by its name only when it is called."""
    parts = [part for part in module.split(".") if part != "__main__"] or ["jaxtrain"]
    words = {f'"{parts[-1]}"', f"jaxtrain.{'.'.join(parts)}"}
    words |= {f'"{module.removeprefix("cli.").replace("evaluate", "eval")}"'}
    texts = {path: path.read_text("utf-8") for path in files()}
    counts = {path: sum(map(text.count, words)) for path, text in texts.items()}
    return sorted(filter(counts.__getitem__, counts), key=lambda path: -counts[path])


@functools.cache
def files() -> tuple[pathlib.Path, ...]:
    """All test files."""
    return tuple(sorted(TESTS.rglob("*_test.py")))


@functools.cache
def modules() -> tuple[str, ...]:
    """The dotted names of all modules below the package; a folder's for its init."""
    names = (path.relative_to(PACKAGE).with_suffix("").parts for path in _sources())
    return tuple(".".join(p for p in parts if p != "__init__") for parts in names)


@functools.cache
def imported(path: pathlib.Path) -> frozenset[str]:
    """The modules of the package that a file names in its imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            found.add(node.module)
    ours = {name.removeprefix("jaxtrain.") for name in found if "jaxtrain" in name}
    return frozenset(ours & set(modules()))


@functools.cache
def _imported_by_module(name: str) -> frozenset[str]:
    path = PACKAGE.joinpath(*name.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return imported(source)


def _sources() -> list[pathlib.Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.read_text().strip())


def main(arguments: list[str]) -> int:
    """Print the test files of the modules that are given as paths."""
    for argument in arguments:
        parts = pathlib.Path(argument).resolve().relative_to(PACKAGE).with_suffix("")
        module = ".".join(part for part in parts.parts if part != "__init__")
        for path in find(module):
            print(path.relative_to(TESTS.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
