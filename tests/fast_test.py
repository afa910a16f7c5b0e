"""The tests for every day touch every module, and a module's tests are found."""

import ast
import pathlib
import queue
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


@pytest.fixture
def collected(request) -> list[pytest.Item]:
    """The tests of a run of all, or of all with some marker."""
    options, source = request.config.option, request.config.args_source
    is_whole = source is pytest.Config.ArgsSource.TESTPATHS
    if not is_whole or options.ignore or options.keyword or options.deselect:
        pytest.skip("only some tests were collected: run pytest without file names")
    return request.session.items


def test_there_are_many_and_none_is_long(collected):
    items = [item for item in collected if item.get_closest_marker("fast")]
    assert len(items) >= 1500
    names = {item.name for item in items}
    assert "test_every_module_belongs_to_a_unit" in names
    long = {"test_resume_after_sigkill_is_bit_exact[lora]"}
    assert not names & long


def test_what_runs_on_request_or_once_exists(collected, request):
    """After a test is renamed its entry names nothing, and the test runs always."""
    if request.config.option.markexpr:
        pytest.skip("only tests with some marker were collected")
    plugins = request.config.pluginmanager.get_plugins()
    (thorough,) = (p.THOROUGH for p in plugins if hasattr(p, "THOROUGH"))
    names = [item.nodeid.removeprefix("tests/") for item in collected]
    files = {name.partition("::")[0] for name in names}  # without those that skip
    unknown = [
        beginning
        for beginning in (*thorough, *fast.NOT_AGAIN)
        if beginning.partition("::")[0] in files
        and not any(name.startswith(beginning) for name in names)
    ]
    assert unknown == []


def test_what_is_left_out_exists():
    for beginning in (*fast.LEFT_OUT, *fast.AGAIN, *fast.NOT_AGAIN):
        assert (find_tests.TESTS / beginning.partition("::")[0]).exists(), beginning


def test_a_mutant_changes_one_place_and_the_seed_chooses_it(tmp_path):
    module = tmp_path / "module.py"
    module.write_text("def f(x):\n    return x + 1 if x < 2 and True else 0\n")
    made = [mutants.make(module, *each).source for each in mutants.places(module)]
    assert len(made) == len({*made}) == 7
    assert "def f(x):\n    return x - 1 if x < 2 and True else 0" in made
    assert "def f(x):\n    return x + 1 if x <= 2 and True else 0" in made
    assert mutants.choose(2, 5) == mutants.choose(2, 5) != mutants.choose(2, 6)


class _Noticing:
    """In place of a checkout: notices the mutants of some lines."""

    def __init__(self, *lines: int) -> None:
        self._lines = lines

    def notice(self, mutant: mutants.Mutant) -> str | None:
        return "a_test.py::test_it" if mutant.line in self._lines else None


def test_a_mutant_that_only_earlier_tests_notice_is_lost():
    today, earlier = queue.Queue(), queue.Queue()
    for _ in range(2):
        today.put(_Noticing(1, 2))
        earlier.put(_Noticing(2, 3))
    module = find_tests.PACKAGE / "loop.py"
    made = [mutants.Mutant(module, line, "") for line in (1, 2, 3, 4)]
    told = {m.line: word for m, word, _ in mutants.judge(made, today, earlier)}
    assert told == {1: "noticed", 2: "noticed", 3: "LOST", 4: "MISSED"}
    assert today.qsize() == earlier.qsize() == 2


def test_a_test_that_fails_without_the_mutant_notices_nothing(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "loop_test.py").write_text("")
    checkout = object.__new__(mutants.Checkout)
    checkout._path, checkout._unsound = tmp_path, set()
    # Of a file's tests in order: one that always fails, and one that the mutant fails.
    module = tmp_path / "loop.py"
    module.write_text("sound")

    def run(tests):
        failing = ["always"] + ["by the mutant"] * (module.read_text() == "broken")
        asked = failing if tests[0] not in failing else tests
        left = [name for name in asked if name in failing]
        return next((name for name in left if name not in checkout._unsound), None)

    monkeypatch.setattr(checkout, "_first_failure", run)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "test_files", lambda _: ["tests/loop_test.py"])
    mutant = mutants.Mutant(module, 1, "broken")
    assert checkout.notice(mutant) == "by the mutant"
    assert checkout._unsound == {"always"}
    assert module.read_text() == "sound"
