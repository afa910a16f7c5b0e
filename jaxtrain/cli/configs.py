"""`jaxtrain configs` and `recipes`: list the configurations that come along."""

import ast
from collections.abc import Sequence
from pathlib import Path

from jaxtrain.cli.command import Parser
from jaxtrain.config.shipped import read_recipe, shipped_config, shipped_configs


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
    _run(parser, arguments, {n: _summary(p) for n, p in shipped_configs().items()})


def recipes_main(arguments: Sequence[str]) -> None:
    """The same for recipes alone, with the memory that each needs.

    Raises:
        ValueError: none of that name comes along.
    """
    parser = Parser(
        "recipes",
        "List the recipes, which are configurations for published models on one"
        " machine,\nor print one of them:"
        " jaxtrain recipes qwen3-4b-dpo-lora > mine.yaml",
    )
    found = {
        name: _summary(path) + f" ({read_recipe(path).memory})"
        for name, path in shipped_configs().items()
        if path.suffix == ".yaml"
    }
    _run(parser, arguments, found)


def _run(parser: Parser, arguments: Sequence[str], found: dict[str, str]) -> None:
    parser.add_argument("name", nargs="?")
    name = parser.parse(arguments).name
    if name is not None:
        print(shipped_config(name).read_text("utf-8"), end="")
        return
    width = max(map(len, found))
    for name, summary in found.items():
        print(f"{name:{width}}  {summary}")


def _summary(path: Path) -> str:
    """The first line of the file's docstring, or of its comments."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    return text.split("\n")[0].removeprefix("# ")
