"""The import rules of the design, read off the syntax trees: who may import whom."""

import ast
import importlib
import importlib.util
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "jaxtrain"
MODULES = sorted(PACKAGE.rglob("*.py"))

# What each unit may import of ours, besides itself. A unit is a module or a folder; one
# that stands here by its dotted name is a unit of its own, apart from its folder. Every
# module belongs to one, every permission is used, and no unit can reach itself.
ALLOWED: dict[str, set[str]] = {
    "models.families": set(),
    "models.stacks": set(),
    "tree": set(),
    "schema": {"record.safe_text", "tree"},
    "objectives.options": {"schema"},
    "config.eval_sets": {"record.safe_text"},
    "config.own_parts": {"schema"},
    "record.safe_text": set(),
    "storage": set(),
    "config.folders": set(),
    "config": {
        "config.eval_sets",
        "models.families",
        "objectives.options",
        "record.safe_text",
        "schema",
        "tree",
    },
    "record.logs": {"record.safe_text"},
    "run.collector": set(),
    "run.interrupts": set(),
    "cli.ending": {"record.logs", "record.safe_text", "run.interrupts"},
    "cli.command": {"config", "storage"},
    "cli": {"cli.command", "cli.ending", "config"},
    "cli.source": {
        "cli.command",
        "config",
        "models",
        "record.safe_text",
        "run.distributed",
        "storage",
    },
    "cli.evaluate": {
        "config.eval_sets",
        "build",
        "cli.source",
        "config",
        "data.batches",
        "data.loading",
        "evaluation",
        "models",
        "models.load",
        "objectives.options",
        "passes",
        "run",
        "run.preflight",
        "run.weights",
        "sharding",
        "tree",
        "types",
        "cli.command",
    },
    "cli.export": {
        "cli.source",
        "config",
        "run",
        "run.preflight",
        "run.weights",
        "cli.command",
    },
    "cli.push": {"cli.command", "run.hub"},
    "cli.generate": {
        "cli.source",
        "config",
        "evaluation",
        "models.load",
        "models.source",
        "record.safe_text",
        "run.weights",
        "cli.command",
    },
    "cli.chat": {
        "cli.generate",
        "cli.source",
        "evaluation",
        "models.load",
        "record.safe_text",
    },
    "__main__": {"cli"},
    "batch": set(),
    "data.batches": {"record.safe_text", "batch", "config"},
    "data.rows": {
        "record.safe_text",
        "config.own_parts",
        "schema",
        "config.folders",
        "storage",
    },
    "run.durable": set(),
    "data.prepare": {
        "record.safe_text",
        "data.batches",
        "data.rows",
        "run.durable",
        "config.folders",
    },
    "data.stream": {"batch", "data.batches", "data.prepare", "data.rows", "storage"},
    "types": {"batch"},
    "sharding": {"config", "kernels", "types"},
    "assets": set(),
    "kernels": set(),
    "models": {
        "record.safe_text",
        "kernels",
        "models.families",
        "models.recompute",
        "models.stacks",
        "sharding",
        "tree",
        "types",
        "config.folders",
        "storage",
    },
    "lora": {
        "record.safe_text",
        "models",
        "models.stacks",
        "sharding",
        "tree",
        "types",
        "config.folders",
        "storage",
    },
    "objectives": {
        "config.own_parts",
        "objectives.options",
        "record.safe_text",
        "types",
    },
    "evaluation": {
        "record.safe_text",
        "config.eval_sets",
        "data.batches",
        "models",
        "objectives",
        "sharding",
        "types",
    },
    "models.special_tokens": {"data.rows", "models"},
    "models.vocabulary": {
        "config",
        "data.rows",
        "lora",
        "models",
        "sharding",
        "tree",
        "types",
    },
    "models.ends": {"config", "lora", "models", "sharding", "tree", "types"},
    "models.source": {
        "assets",
        "config",
        "data.loading",
        "models",
        "models.ends",
        "models.families",
        "models.special_tokens",
        "models.vocabulary",
    },
    "models.mixture_options": {"config", "models", "sharding", "types"},
    "models.recompute": {"kernels"},
    "models.parted": {"config", "models", "models.stacks", "sharding", "types"},
    "models.recompute_options": {"config", "models", "sharding"},
    "models.load": {
        "config",
        "evaluation",
        "kernels",
        "lora",
        "models",
        "models.ends",
        "models.mixture_options",
        "models.parted",
        "models.recompute_options",
        "models.source",
        "models.vocabulary",
        "record",
        "sharding",
        "types",
    },
    "record": {
        "batch",
        "config.eval_sets",
        "config.own_parts",
        "models.stacks",
        "record.logs",
        "record.safe_text",
        "run.durable",
        "tree",
        "types",
    },
    "run": {
        "batch",
        "config",
        "config.eval_sets",
        "config.folders",
        "config.own_parts",
        "data.batches",
        "data.stream",
        "evaluation",
        "lora",
        "models",
        "models.load",
        "models.special_tokens",
        "models.state",
        "objectives.options",
        "optimizers",
        "record",
        "record.safe_text",
        "run.buffer",
        "run.collector",
        "run.durable",
        "run.hub",
        "run.ledger",
        "run.lock",
        "run.preemption",
        "run.saved_record",
        "sharding",
        "storage",
        "tree",
        "types",
    },
    "run.preemption": {"run.interrupts"},
    "run.ledger": {"run.durable", "storage"},
    "run.buffer": {"config.folders", "storage"},
    "run.lock": {"run.buffer", "run.ledger", "run.lock_file", "storage"},
    "run.lock_file": {"run.durable", "storage"},
    "run.hub": set(),
    "run.saved_record": {"storage"},
    "run.preflight": {
        "config",
        "run.hub",
        "run.ledger",
        "run.saved_record",
        "storage",
    },
    "run.fp8_step": {"config", "kernels", "models.load", "run"},
    "run.fitted_step": {
        "config",
        "models.load",
        "models.recompute",
        "record",
        "run",
        "run.out_of_memory",
    },
    "run.out_of_memory": {"config", "models.state", "record"},
    "run.trial": {"config.eval_sets", "config", "schema", "types"},
    "run.weights": {
        "config",
        "models",
        "models.load",
        "models.source",
        "models.state",
        "optimizers",
        "run",
        "run.preflight",
        "run.saved_record",
        "sharding",
        "tree",
        "types",
    },
    "step": {"record", "tree", "types"},
    "loop": {
        "batch",
        "config",
        "data.batches",
        "data.stream",
        "evaluation",
        "models.load",
        "record",
        "run",
        "run.preemption",
        "run.preflight",
        "step",
        "tree",
        "types",
    },
    "record.start": {
        "config.eval_sets",
        "config",
        "data.batches",
        "loop",
        "record",
        "run",
        "run.buffer",
        "tree",
        "record.logs",
    },
    "optimizers": {
        "config",
        "config.own_parts",
        "models.stacks",
        "sharding",
        "step",
        "tree",
        "types",
    },
    "models.state": {
        "config",
        "lora",
        "models",
        "models.load",
        "models.parted",
        "optimizers",
        "record",
        "sharding",
        "tree",
        "types",
    },
    "passes": {
        "config",
        "run.durable",
        "data.batches",
        "models.load",
        "objectives",
        "run",
        "sharding",
        "step",
        "types",
    },
    "build": {
        "config",
        "data.batches",
        "loop",
        "models",
        "models.load",
        "models.mixture_options",
        "models.parted",
        "models.state",
        "objectives",
        "objectives.options",
        "optimizers",
        "passes",
        "record",
        "record.start",
        "run",
        "run.fitted_step",
        "run.fp8_step",
        "run.ledger",
        "run.preemption",
        "sharding",
        "step",
        "types",
    },
    "aot": {
        "data.batches",
        "batch",
        "build",
        "cli.command",
        "cli.ending",
        "config",
        "kernels",
        "models.load",
        "models.recompute",
        "models.state",
        "optimizers",
        "run.fitted_step",
        "run.fp8_step",
        "run.out_of_memory",
        "sharding",
        "types",
    },
    "data": set(),
    "data.sources": {
        "config.eval_sets",
        "config",
        "data.batches",
        "data.rows",
        "storage",
    },
    "data.loading": {
        "record.safe_text",
        "config.eval_sets",
        "assets",
        "config",
        "data.batches",
        "data.prepare",
        "data.rows",
        "data.stream",
    },
    "data.inspect": {
        "cli.command",
        "cli.ending",
        "config",
        "data.batches",
        "data.loading",
        "data.prepare",
        "data.rows",
        "data.stream",
        "record.safe_text",
    },
    "run.distributed": set(),
    "trainer": {
        "run.lock",
        "build",
        "config",
        "data.batches",
        "data.loading",
        "data.sources",
        "data.stream",
        "models.load",
        "record",
        "run",
        "run.distributed",
        "run.out_of_memory",
        "run.preflight",
        "run.trial",
        "types",
    },
    "dpo_trainer": {
        "config.eval_sets",
        "data.loading",
        "models.load",
        "models.special_tokens",
        "run",
        "trainer",
    },
    "model_manager": {"config", "models.load", "run"},
    "lm_eval": {
        "assets",
        "batch",
        "cli.command",
        "cli.ending",
        "cli.source",
        "config",
        "evaluation",
        "model_manager",
        "models",
        "run.distributed",
        "types",
    },
    "main": {
        "run.buffer",
        "run.lock",
        "cli.command",
        "cli.ending",
        "data.sources",
        "run.distributed",
        "run.preflight",
        "trainer",
        "record.logs",
        "run.collector",
        "run.interrupts",
    },
    "metrics": {"batch", "evaluation", "record", "types"},
    "report": {"config.eval_sets", "cli.command", "cli.ending", "tree"},
}
ONLY_IN = {"flax": {"models"}, "torch": set(), "pickle": set()}
NEVER_IN = {
    "jax": {"data", "assets", "config", "report"},
    "orbax": {"step", "objectives"},
}


def dotted(path: pathlib.Path) -> str:
    """A module's name below the package; a folder's for its `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def unit(name: str) -> str:
    """The unit that a dotted name below the package belongs to: the longest one."""
    while name and name not in ALLOWED:
        name = name.rpartition(".")[0]
    return name


def imports(path: pathlib.Path) -> set[str]:
    """Every dotted name that a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import on line {node.lineno}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def our_units(path: pathlib.Path) -> set[str]:
    """The units that a module imports, its own left out."""
    ours = (name.removeprefix("jaxtrain.") for name in imports(path) if _is_ours(name))
    return {unit(name) for name in ours} - {unit(dotted(path)), ""}


def _is_ours(name: str) -> bool:
    return name.startswith("jaxtrain.")


MODULE_IDS = [dotted(path) or "jaxtrain" for path in MODULES]


def test_every_module_belongs_to_a_unit():
    assert not [path for path in MODULES if dotted(path) and not unit(dotted(path))]


@pytest.mark.parametrize("path", MODULES, ids=MODULE_IDS)
def test_imports_go_one_way(path):
    extra = our_units(path) - ALLOWED.get(unit(dotted(path)), set())
    assert not extra, f"{path} may not import {sorted(extra)}"


def test_every_permission_is_used():
    used: dict[str, set[str]] = {name: set() for name in ALLOWED}
    for path in MODULES:
        if dotted(path):
            used[unit(dotted(path))] |= our_units(path)
    unused = {name: sorted(ALLOWED[name] - used[name]) for name in ALLOWED}
    assert not {name: units for name, units in unused.items() if units}


def test_no_unit_can_reach_itself():
    def reachable(name: str, seen: set[str]) -> set[str]:
        for other in ALLOWED[name] - seen:
            seen |= {other}
            seen |= reachable(other, seen)
        return seen

    assert not [name for name in ALLOWED if name in reachable(name, set())]


@pytest.mark.parametrize("path", MODULES, ids=MODULE_IDS)
def test_libraries_stay_where_they_belong(path):
    roots = {name.split(".")[0] for name in imports(path)}
    top = dotted(path).split(".")[0]
    for library, units in ONLY_IN.items():
        if library in roots:
            assert top in units, f"{library} belongs in {sorted(units)} only"
    for library, units in NEVER_IN.items():
        if top in units:
            assert library not in roots, f"{top} must not import {library}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_private_jax_and_no_evaluated_data(path):
    assert not [n for n in imports(path) if n.startswith("jax._src")]
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & {"eval", "exec"}


def test_every_module_and_public_name_has_a_docstring():
    missing = []
    for path in MODULES:
        tree = ast.parse(path.read_text())
        if tree.body and ast.get_docstring(tree) is None:
            missing.append(str(path))
        for node in tree.body:
            is_public = isinstance(
                node, ast.FunctionDef | ast.ClassDef
            ) and not node.name.startswith("_")
            if is_public and ast.get_docstring(node) is None:
                missing.append(f"{path}:{node.name}")
    assert not missing, missing


def test_the_rules_name_units_that_exist():
    present = {dotted(path) for path in MODULES}
    assert set(ALLOWED) <= present


def test_the_package_shows_its_plan():
    """At most 13 modules stand beside the folders."""
    flat = [p for p in PACKAGE.glob("*.py") if not p.stem.startswith("__")]
    assert len(flat) <= 13


@pytest.mark.parametrize(
    "path", sorted((PACKAGE.parent / "benchmarks").rglob("*.py")), ids=lambda p: p.name
)
def test_benchmarks_import_what_there_is(path):
    """Most of them run on GPUs alone, where nobody looks each time."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level:
            continue
        if (node.module or "").split(".")[0] != PACKAGE.name:
            continue
        module = importlib.import_module(node.module)
        for name in (alias.name for alias in node.names):
            below = f"{node.module}.{name}"
            is_there = hasattr(module, name) or importlib.util.find_spec(below)
            assert is_there, f"{path.name}: {node.module} has no {name}"
