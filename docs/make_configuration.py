"""Write docs/configuration.md from the declarations in jaxtrain/config/sections.py.

python docs/make_configuration.py
"""

import ast
import inspect
import itertools
import pathlib
import typing
from collections.abc import Iterator

from jaxtrain import schema
from jaxtrain.config.sections import (
    LORA_LEARNING_RATES,
    NESTED_SECTIONS,
    PLAIN_SECTIONS,
    SCHEMA,
    TRAINING_SECTIONS,
    TYPE_DEFAULTS,
    DpoSection,
    LoraSection,
    TrainingType,
)

OUTPUT = pathlib.Path(__file__).resolve().parent / "configuration.md"
HEADER = """# Configuration

Every key, from its declaration in
[jaxtrain/config/sections.py](../jaxtrain/config/sections.py), of which this page is
made (`python docs/make_configuration.py`). Set a key in a config file, in YAML
(`training: {dpo: {beta: 0.2}}`) or on the command line (`--training.dpo.beta=0.2`).

A flag always wins over a file, over the block of the active type too. The block of the
active `training.training_type` (from_scratch, sft, lora or dpo) may hold any key of
`training`, and wins over it: training.dpo.learning_rate is DPO's.

A file may hold keys that do nothing in its run, such as another type's block: the log
names them in one line. A flag that would do nothing is refused, with the key that acts
in its place. A key that is unknown, of a wrong type or that contradicts another is
refused wherever it stands; all of them are named at once.
"""
TABLE = "\n| key | default | allowed | what it does |\n|---|---|---|---|\n"


def documentation(section: type) -> dict[str, str]:
    """The text below each field of a dataclass, inherited ones too, in one line."""
    texts: dict[str, str] = {}
    for each in reversed(section.__mro__[:-1]):
        (node,) = ast.parse(inspect.getsource(each)).body
        assert isinstance(node, ast.ClassDef)
        for field, below in itertools.pairwise(node.body):
            match field, below:
                case (
                    ast.AnnAssign(target=ast.Name(name)),
                    ast.Expr(value=ast.Constant(str(text))),
                ):
                    texts[name] = " ".join(text.split())
    return texts


def row(path: str, *cells: str) -> str:
    escaped = (cell.replace("|", r"\|") for cell in cells)
    return f"| `{path}` | {' | '.join(escaped)} |\n"


def key_row(path: str, leaf: schema.Leaf, text: str) -> str:
    """A key's default, what it may hold, and what it does."""
    allowed = schema.describe(leaf.hint)
    for unit in leaf.all(schema.Unit):
        allowed += f" ({unit.name})"
    for readers in leaf.all(schema.ReadBy):
        text += f" Read by {', '.join(readers.names)}."
    for fact in leaf.all(schema.NoEffect):
        text += f" Accepted, without effect in JAX: {fact.instead}."
    default = "unset" if leaf.default is None else f"`{leaf.default!r}`"
    return row(path, default, allowed, text)


def rows(section: type, prefix: str) -> Iterator[str]:
    """A row for each key of a section, its sub-sections' after a row of their own."""
    texts, shared = documentation(section), getattr(section, "ONLY_IF", None)
    for name, entry in schema.schema_of(section).items():
        path = f"{prefix}.{name}"
        if isinstance(entry, schema.Leaf):
            own = [each for each in entry.all(schema.OnlyIf) if each is not shared]
            conditions = [condition.describe() for condition in own]
            yield key_row(path, entry, " ".join([texts[name], *conditions]))
        else:
            below = typing.get_type_hints(section)[name]
            yield row(path, "", "a section", inspect.getdoc(below) or "")
            yield from rows(below, path)


def section_text(section: type, prefix: str) -> str:
    """A section's docstring and its table."""
    text = inspect.getdoc(section) or ""
    if hasattr(section, "ONLY_IF"):
        text += f" {section.ONLY_IF.describe()}"
    return f"\n{text}\n{TABLE}{''.join(rows(section, prefix))}"


def defaults_by_type() -> str:
    types = typing.get_args(TrainingType)
    text = "\nDefaults by type:\n\n| key |" + "".join(f" {name} |" for name in types)
    text += "\n" + "|---" * (len(types) + 1) + "|\n"
    for key in TYPE_DEFAULTS["sft"]:
        values = [f"{TYPE_DEFAULTS[name][key]}" for name in types]
        text += row(f"training.{key}", *values)
    rates = ", ".join(f"{name} {rate}" for name, rate in LORA_LEARNING_RATES.items())
    return text + f"\nWith training.lora.enabled the learning rate is {rates}.\n"


def make_page() -> str:
    parts = [HEADER]

    def add(heading: str, *texts: str) -> None:
        parts.append("".join((f"\n## {heading}\n", *texts)))

    add("model", section_text(PLAIN_SECTIONS["model"], "model"))
    add("data", section_text(PLAIN_SECTIONS["data"], "data"))
    training_type = SCHEMA["training"]["training_type"]
    general = [section_text(each, "training") for each in TRAINING_SECTIONS.values()]
    nested = [
        section_text(each, f"training.{name}") for name, each in NESTED_SECTIONS.items()
    ]
    what = "What is trained, and how."
    first = TABLE + key_row("training.training_type", training_type, what)
    add("training", first, defaults_by_type(), *general, *nested)
    add("training.lora", section_text(LoraSection, "training.lora"))
    add("training.dpo", section_text(DpoSection, "training.dpo"))
    add("mesh", section_text(PLAIN_SECTIONS["mesh"], "mesh"))
    return "".join(parts)


if __name__ == "__main__":
    OUTPUT.write_text(make_page())
