"""`jaxtrain configs`: list the configurations that come along, or print one."""

import ast
from collections.abc import Sequence
from pathlib import Path

from jaxtrain.cli.command import Parser
from jaxtrain.config.files import shipped_config, shipped_configs


def main(arguments: Sequence[str]) -> None:
    """List all, or print the one that is named, to change a copy of it.

    Raises:
        ValueError: none of that name comes along.
    """
    parser = Parser(
        "configs",
        "List the configurations that come with jaxtrain, or print one of them:\n"
        "jaxtrain configs dpo > my_dpo.py",
    )
    parser.add_argument("name", nargs="?")
    name = parser.parse(arguments).name
    if name is not None:
        print(shipped_config(name).read_text("utf-8"), end="")
        return
    found = shipped_configs()
    width = max(map(len, found))
    for name, path in found.items():
        print(f"{name:{width}}  {_summary(path)}")


def _summary(path: Path) -> str:
    """The first line of the file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split("\n")[0]
