"""The files that a project needs beside its code: they agree with it and each other."""

import pathlib
import re
import tomllib

import pytest
import yaml

import jaxtrain

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))
LINKED = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "llms.txt")


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == jaxtrain.__version__
    assert {"cff-version", "message", "title", "authors", "license"} <= set(citation)
    log = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (\S+) \((?:unreleased|\d{4}-\d\d-\d\d)\)$", log, re.M)
    assert newest is not None and newest[1] == jaxtrain.__version__


@pytest.mark.parametrize("name", LINKED)
def test_links_lead_to_files(name):
    text = (ROOT / name).read_text()
    targets = re.findall(r"\]\(([^)#:]+)[)#]", text)
    assert [each for each in targets if not (ROOT / each).is_file()] == []


def test_every_page_of_the_documentation_is_in_llms_txt():
    text = (ROOT / "llms.txt").read_text()
    assert text.startswith("# jaxtrain\n\n> ")
    pages = {page.relative_to(ROOT).as_posix() for page in ROOT.glob("docs/**/*.md")}
    missing = pages - {"docs/index.md", *re.findall(r"\]\((\S+)\)", text)}
    assert not missing, "add a line for each to llms.txt"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_only_calls_our_scripts(path):
    """What it runs is what anyone can run here: one line, of a file that exists."""
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"]["contents"] == "read"
    for job in workflow["jobs"].values():
        for step in job.get("steps", ()):
            if command := step.get("run"):
                script = re.fullmatch(r"bash (\S+\.sh)( \S+)?", command)
                assert script and (ROOT / script[1]).is_file(), command
            else:
                assert re.fullmatch(r"[\w/-]+@(v\d+|release/v1)", step["uses"])
        if "uses" in job:
            assert (ROOT / job["uses"]).is_file()


def test_what_the_workflows_run_is_what_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    test = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    job = test["jobs"]["test"]
    scripts = {step["run"] for step in job["steps"] if "run" in step}
    assert scripts == {"bash tests/run.sh", "bash tests/package.sh"}
    assert all(script in ci for script in scripts)
    versions = {row["python"] for row in job["strategy"]["matrix"]["include"]}
    assert versions == {"3.11", "3.12"}


def test_only_the_upload_may_act_in_the_projects_name():
    release = yaml.safe_load(
        (ROOT / ".github" / "workflows" / "release.yml").read_text()
    )
    jobs = release["jobs"]
    assert release[True]["push"]["tags"] == ["v*"]  # YAML 1.1 reads `on` as true
    allowed = {name for name, job in jobs.items() if "permissions" in job}
    assert allowed == {"upload"}
    assert jobs["upload"]["permissions"] == {"id-token": "write"}
    assert (jobs["build"]["needs"], jobs["upload"]["needs"]) == ("test", "build")
    assert not re.search(r"secrets\.|password|api.token", str(release))


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_form_has_what_github_asks_for(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"]
    assert {part["type"] for part in form["body"]} <= {"textarea", "input", "markdown"}
    names = [part["id"] for part in form["body"]]
    assert len(names) == len({*names})


def test_the_hooks_run_what_the_tests_check():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (repository,) = hooks["repos"]
    run = (ROOT / "tests" / "run.sh").read_text()
    for hook in repository["hooks"]:
        tool = hook["entry"].split()[0].removeprefix(".venv/bin/")
        assert f'"$VENV/bin/{tool}"' in run


def test_types_are_for_users_too():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    package = pathlib.Path(jaxtrain.__file__).parent
    assert (package / "py.typed").is_file()
    assert "py.typed" in settings["setuptools"]["package-data"]["jaxtrain"]
