"""Write docs/configuration.md from configs/base.py: its keys, defaults and comments.

python docs/make_configuration.py
"""

import ast
import io
import pathlib
import tokenize
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCE = ROOT / "configs" / "base.py"
OUTPUT = ROOT / "docs" / "configuration.md"

# Function of base.py: where its keys stand.
SECTIONS = {
    "model": "model",
    "data": "data",
    "training": "training",
    "hyperparameters": "training",
    "lora": "training.lora",
    "dpo": "training.dpo",
    "mesh": "mesh",
}
HEADER = """# Configuration

Every key of [configs/base.py](../configs/base.py), from which this page is generated
(`python docs/make_configuration.py`). Set a key in a config file, on the command line
(`--config.training.dpo.beta=0.2`) or in YAML (`training: {dpo: {beta: 0.2}}`).

The block of the active `training.training_type` (from_scratch, sft, lora or dpo) may
hold any key of `training` too, and overrides it. A key that is unknown, of a wrong
type or without effect beside the others is refused, all of them at once.
"""


def comments_by_line(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """(whole-line comments, comments behind code), by line number."""
    whole, behind = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("#").strip()
            alone = token.line.lstrip().startswith("#")
            (whole if alone else behind)[token.start[0]] = text
    return whole, behind


def rows(
    node: ast.Dict,
    prefix: str,
    whole: dict[int, str],
    behind: dict[int, str],
) -> Iterator[tuple[str, str, str]]:
    """(key, default, what it does) of a dict display, sub-dicts included."""
    for key, value in zip(node.keys, node.values, strict=True):
        if not isinstance(key, ast.Constant) or _is_block(value):
            continue  # general keys, and blocks that repeat them: listed elsewhere
        above, line = [], key.lineno - 1
        while line in whole and not whole[line].startswith("---"):
            above.insert(0, whole[line])
            line -= 1
        lines = range(key.lineno, (value.end_lineno or key.lineno) + 1)
        if isinstance(value, ast.Dict):
            lines = range(key.lineno, key.lineno + 1)
        text = " ".join([*above, *(behind[n] for n in lines if n in behind)])
        path = f"{prefix}.{key.value}"
        if isinstance(value, ast.Dict):
            yield path, "", text
            yield from rows(value, path, whole, behind)
        else:
            yield path, default_of(value), text


def _is_block(value: ast.expr) -> bool:
    """Whether a value only takes over other sections: `{**dpo(), ...}`."""
    if isinstance(value, ast.Dict):
        return all(key is None for key in value.keys)
    return isinstance(value, ast.Call) and ast.unparse(value.func) == "all_unset"


def default_of(value: ast.expr) -> str:
    """A default as a reader writes it; `unset` where nothing is."""
    if isinstance(value, ast.Call):
        if ast.unparse(value.func) == "unset":
            return "unset"
        inner = ast.unparse(value.args[0]) if value.args else ""
        return "unset" if inner == "None" else f"`{inner}`"
    return f"`{ast.unparse(value)}`"


def make_page(source: str) -> str:
    """The page for base.py's source."""
    whole, behind = comments_by_line(source)
    functions = {
        node.name: node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
    }
    parts = [HEADER]
    for name, prefix in SECTIONS.items():
        function = functions[name]
        if name != "hyperparameters":
            parts.append(f"\n## {prefix}\n")
        docstring = ast.get_docstring(function)
        if docstring:
            parts.append(f"```text\n{docstring}\n```\n")
        parts.append("| key | default | what it does |\n|---|---|---|")
        returned = next(n for n in function.body if isinstance(n, ast.Return))
        assert isinstance(returned.value, ast.Dict)
        for key, default, text in rows(returned.value, prefix, whole, behind):
            parts.append(
                f"| `{key}` | {default} | {text.replace('|', chr(92) + '|')} |"
            )
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(make_page(SOURCE.read_text()))
