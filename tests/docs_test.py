"""The documentation says what the code does, and its commands run."""

import importlib.util
import json
import pathlib
import re
import runpy
import shutil
import sys
import xml.etree.ElementTree
from collections.abc import Iterator

import jax
import pytest

from jaxtrain.config import default_config
from jaxtrain.tree import dotted

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import docs_commands

ROOT = pathlib.Path(__file__).resolve().parent.parent
BLOCKS = ("from_scratch", "sft", "lora", "dpo")
PAGES = [
    page.relative_to(ROOT)
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
]

# What no test here can run, by its beginning, and why. Its syntax is checked, and the
# flags and keys of every `python -m jaxtrain...` in it.
NOT_RUN = {
    "python3 -m venv": "installs; the run in it is that of main_test",
    "pip install": "installs",
    "bash tests/run.sh": "is what runs this",
    "jaxtrain train qwen3": "needs the hub; tests/recipes_test.py resolves recipes",
    "jaxtrain aot": "minutes of compilation; tests/aot_test.py runs it",
    "PYTHONPATH=. python benchmarks/scaling.py": "an hour of compilation, for TPUs",
    "PYTHONPATH=. python benchmarks/host_scaling.py": "needs several GPUs",
    "python -m jaxtrain.lm_eval --model=Qwen": "needs the hub",
    "jaxtrain push": "needs the hub; tests/hub_test.py runs it",
    "until jaxtrain": "bash restarts it; tests/preemption_test.py sends the signal",
}
# Packages that a command needs beyond `[test]`: where one is missing, as in the CI's
# run without peers, the command's syntax and flags are checked and no more.
NEEDS = {
    "AutoModelForCausalLM": "torch",
    "PeftModel": "peft",
    "jaxtrain.lm_eval": "lm_eval",
    "generation.metrics=exact_match,bleu": "sacrebleu",
    "generation.metrics=rouge": "rouge_score",
    # Of the run that was trained with these metrics.
    "out/measured": "sacrebleu",
}


def reason_not_to_run(command: str) -> str | None:
    for beginning, reason in NOT_RUN.items():
        if command.startswith(beginning):
            return reason
    for text, package in NEEDS.items():
        if text in command and importlib.util.find_spec(package) is None:
            return f"needs {package}"
    return None


@pytest.fixture
def sandbox(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pathlib.Path]:
    """A working directory that looks like the repository's root to commands."""
    for name in ("configs", "docs", "launch", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXTRAIN_CACHE", str(tmp_path / "cache"))
    # A step or two of each program: most of the time goes into compiling it.
    jax.config.update("jax_disable_most_optimizations", True)
    yield tmp_path
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=str)
@pytest.mark.usefixtures("sandbox")
def test_every_command_of_the_page_runs(page: pathlib.Path) -> None:
    """In the page's order and one folder, as a reader would; see docs_commands."""
    for block in docs_commands.blocks(ROOT / page):
        for command in docs_commands.commands(block):
            if reason_not_to_run(command) is not None:
                continue
            try:
                docs_commands.run(command)
            except (Exception, SystemExit) as error:
                pytest.fail(
                    f"{page}: this command fails, with {type(error).__name__}: {error}"
                    f"\n{command}\nMend the page, or tell tests/docs_test.py's NOT_RUN"
                    " why no test can run it"
                )


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_command_of_the_page_can_be_read(
    page: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those too that are not run: bash's syntax, our flags and configuration keys."""
    monkeypatch.chdir(ROOT)
    for block in docs_commands.blocks(ROOT / page):
        docs_commands.check_syntax(block)
        for command in docs_commands.commands(block):
            problem = docs_commands.find_unknown_flag(command)
            assert problem is None, f"{page}: {problem} in\n{command}"


def test_what_is_not_run_is_on_a_page() -> None:
    """A reason that excuses nothing any more is deleted, not kept."""
    found = [
        command
        for page in PAGES
        for block in docs_commands.blocks(ROOT / page)
        for command in docs_commands.commands(block)
    ]
    for beginning in NOT_RUN:
        assert any(command.startswith(beginning) for command in found), beginning


def test_a_wrong_command_is_found(sandbox: pathlib.Path) -> None:
    """The tests above can fail: a flag, a key, a module and a file that are not."""
    main = "python -m jaxtrain.main --workdir=out/x --config=configs/sft.py"
    assert docs_commands.find_unknown_flag(main) is None
    for wrong in (
        f"{main} --modle=x",
        f"{main} --config.training.max_step=3",
        "python -m jaxtrain.mian --workdir=out/x",
        "true && .venv/bin/python -m jaxtrain.main --config=configs/none.py",
    ):
        assert docs_commands.find_unknown_flag(wrong) is not None, wrong
    with pytest.raises(AssertionError):
        docs_commands.run("ls nowhere")
    with pytest.raises(AssertionError):
        docs_commands.run("python -m jaxtrain.report out/nowhere")


def test_a_block_is_read_as_bash_reads_it() -> None:
    block = "# a\nls \\\n    -l\n\ncat > x <<'EOF'\n# kept\nEOF\npwd\n"
    assert list(docs_commands.commands(block)) == [
        "ls -l",
        "cat > x <<'EOF'\n# kept\nEOF",
        "pwd",
    ]


def test_the_plot_of_the_readme_is_drawn_from_a_runs_metrics(
    tmp_path: pathlib.Path,
) -> None:
    module = runpy.run_path(str(ROOT / "docs" / "make_plot.py"))
    names = [curve[0] for curve in module["CURVES"]]
    records = [{"step": s, **dict.fromkeys(names, s / 10)} for s in (0, 5, 10)]
    lines = "".join(f"{json.dumps(r)}\n" for r in [*records, {"step": 3, "loss": 1}])
    (tmp_path / "metrics.jsonl").write_text(lines)
    target = tmp_path / "images" / "plot.svg"
    assert module["main"]([str(tmp_path), str(target)]) == 0
    drawing = xml.etree.ElementTree.parse(target).getroot()
    kinds = [part.tag.rpartition("}")[2] for part in drawing]
    assert kinds.count("circle") == len(names) * len(records)
    assert (ROOT / "docs" / "images" / "dpo.svg").stat().st_size < 60 * 1024
    assert "docs/images/dpo.svg" in (ROOT / "README.md").read_text()


def test_the_pages_link_to_files_that_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)[)#]", (ROOT / page).read_text()):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


def test_the_configuration_page_is_that_of_the_code():
    """If this fails: python docs/make_configuration.py."""
    module = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))
    expected = module["make_page"]()
    assert (ROOT / "docs" / "configuration.md").read_text() == expected


def test_the_configuration_page_has_every_key_with_a_word_on_it():
    page = (ROOT / "docs" / "configuration.md").read_text()
    general = default_config().training
    for key in dotted(default_config().to_dict()):
        parts = key.split(".")
        in_block = parts[0] == "training" and parts[1] in BLOCKS and len(parts) > 2
        if in_block and parts[2] in general:
            continue  # a general key's twin
        assert f"| `{key}` |" in page, key
    for line in page.splitlines():
        if line.startswith("| `training"):
            assert line.count("|") >= 4, line
