"""The import rules of the design, read off the syntax trees: who may import whom."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "jaxtrain"
MODULES = sorted(PACKAGE.rglob("*.py"))

# What a module (or, for a folder, each module in it) may import of ours. Modules that
# are absent here are leaves of the graph above them and may import anything but
# `trainer`, `dpo_trainer` and `main`.
ALLOWED = {
    "types": set(),
    "config": {"config_rules", "config_schema", "config_sections"},
    "mesh_shape": set(),
    "config_rules": {"config_schema", "config_sections", "mesh_shape"},
    "config_sections": {"config_schema"},
    "config_schema": set(),
    "sharding": {"mesh_shape"},
    "kernels": {"kernels"},
    "data": {"data", "config", "assets"},
    "assets": {"assets", "data"},
    "objectives": {"types", "kto", "preference", "preference_losses"},
    "preference": {"types", "preference_losses"},
    "kto": {"types", "preference", "preference_losses"},
    "preference_losses": {"types"},
    "step": {"types", "diagnostics"},
    "diagnostics": {"types"},
    "optim": {"types", "schedules"},
    "schedules": set(),
    "lora": {"types", "lora_targets", "peft_files", "quantization"},
    "lora_targets": {"types", "quantization"},
    "peft_files": {"types", "lora_targets", "peft_tensors"},
    "peft_tensors": {"types", "lora_targets", "quantization"},
    "quantization": set(),
    "models": {"models", "kernels", "types", "sharding", "quantization"},
    "checkpoint": {"types"},
    "metrics": {"types", "text_metrics"},
    "text_metrics": set(),
    "report": set(),
    "samples": {"data", "generate", "text_metrics", "types"},
    "throughput": set(),
    "distributed": set(),
    "goodput": set(),
    "aot_search": set(),
    "hlo_cost": {"hlo_groups", "hlo_text"},
    "hlo_groups": set(),
    "hlo_text": set(),
    "aot_gpu": {"aot_report", "kernels"},
    "jaxpr_cost": set(),
    "preemption": set(),
    "tracking": set(),
    "generate": {"types", "models"},
    "lm_eval": {"distributed", "lm_eval_model"},
    "lm_eval_model": {
        "assets",
        "config",
        "generate",
        "model_manager",
        "models",
        "types",
    },
}
ONLY_IN = {"flax": {"models"}, "torch": set(), "pickle": set()}
NO_JAX = {
    "data",
    "assets",
    "config",
    "config_rules",
    "config_schema",
    "config_sections",
    "mesh_shape",
}
NEVER_IN = {"jax": NO_JAX, "orbax": {"step", "objectives"}}
ORCHESTRATION = {
    "trainer": {"main", "dpo_trainer", "aot"},
    "dpo_trainer": {"main"},
    "aot": set(),
}


def unit(path: pathlib.Path) -> str:
    """The name the rules use: a module's, or its top folder's."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


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
    found = {n.split(".")[1] for n in imports(path) if n.startswith("jaxtrain.")}
    return {name for name in found if (PACKAGE / name).exists() or _is_module(name)}


def _is_module(name: str) -> bool:
    return (PACKAGE / f"{name}.py").exists()


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    allowed = ALLOWED.get(unit(path))
    if allowed is not None:
        extra = our_units(path) - allowed - {unit(path)}
        assert not extra, f"{path} may not import {sorted(extra)}"
    for target, importers in ORCHESTRATION.items():
        if target in our_units(path):
            assert unit(path) in importers, f"only {importers} may import {target}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_libraries_stay_where_they_belong(path):
    roots = {name.split(".")[0] for name in imports(path)}
    for library, units in ONLY_IN.items():
        if library in roots:
            assert unit(path) in units, f"{library} belongs in {sorted(units)} only"
    for library, units in NEVER_IN.items():
        if unit(path) in units:
            assert library not in roots, f"{unit(path)} must not import {library}"


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
    present = {unit(path) for path in MODULES}
    assert set(ALLOWED) <= present
