"""The tests for every day touch every module, and a module's tests are found."""

import ast
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import fast
import find_tests
import mutants


def has_fast_tests(path):
    """Whether some test of a file is fast, as far as its text tells."""
    name = path.relative_to(find_tests.TESTS).as_posix()
    text = path.read_text()
    always = any(f"pytestmark = pytest.mark.{each}" in text for each in fast.MARKERS)
    tests = [
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    return not always and any(
        fast.is_fast(
            f"{name}::{test.name}",
            {ast.unparse(each).rpartition(".")[2] for each in test.decorator_list},
        )
        for test in tests
    )


def test_a_fast_test_touches_every_module():
    fast_files = {path for path in find_tests.files() if has_fast_tests(path)}
    modules = [name for name in find_tests.modules() if name]
    assert len(modules) > 200
    untouched = [name for name in modules if not fast_files & {*find_tests.find(name)}]
    assert untouched == []


def test_a_modules_tests_are_found_by_its_name(capsys):
    path = find_tests.PACKAGE / "data" / "rows" / "columns.py"
    assert find_tests.main([str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "tests/data/columns_test.py"


def test_there_are_many_and_none_is_long(request):
    options, source = request.config.option, request.config.args_source
    is_whole = source is pytest.Config.ArgsSource.TESTPATHS
    if not is_whole or options.ignore or options.keyword or options.deselect:
        pytest.skip("only some tests were collected: run pytest without file names")
    items = [item for item in request.session.items if item.get_closest_marker("fast")]
    assert len(items) >= 1500
    names = {item.name for item in items}
    assert "test_every_module_belongs_to_a_unit" in names
    long = {"test_resume_after_sigkill_is_bit_exact[lora]"}
    assert not names & long


def test_what_is_left_out_exists():
    for beginning in fast.LEFT_OUT:
        assert (find_tests.TESTS / beginning.partition("::")[0]).exists(), beginning


def test_a_mutant_changes_one_place_and_the_seed_chooses_it(tmp_path):
    module = tmp_path / "module.py"
    module.write_text("def f(x):\n    return x + 1 if x < 2 and True else 0\n")
    made = [mutants.make(module, *each).source for each in mutants.places(module)]
    assert len(made) == len({*made}) == 7
    assert "def f(x):\n    return x - 1 if x < 2 and True else 0" in made
    assert "def f(x):\n    return x + 1 if x <= 2 and True else 0" in made
    assert mutants.choose(2, 5) == mutants.choose(2, 5) != mutants.choose(2, 6)
