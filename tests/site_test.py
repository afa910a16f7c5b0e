"""The documentation site: built strictly, with an API reference from the docstrings."""

import os
import pathlib
import re
import subprocess
import sys
import urllib.parse

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for name in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(name, reason=f"no {name}: pip install 'jaxtrain[docs]'")
    target = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        ["bash", str(ROOT / "docs" / "build.sh"), str(target)],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr[-3000:]
    return target


def test_it_builds_without_a_warning_and_has_every_page(site):
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
    for page in pages:
        assert (site / page.relative_to(ROOT)).with_suffix(".html").is_file(), page


def test_its_links_lead_to_pages_of_it(site):
    """Those within it: pages, sections of pages, and files to download."""
    texts = {path: path.read_text() for path in site.rglob("*.html")}
    ids = {path: {*re.findall(r'\bid="([^"]+)"', text)} for path, text in texts.items()}
    broken = []
    for path, text in texts.items():
        if path.name in ("genindex.html", "py-modindex.html", "search.html"):
            continue
        for link in re.findall(r'<a [^>]*href="([^"]+)"', text):
            address, _, anchor = urllib.parse.unquote(link).partition("#")
            if ":" in address:
                continue
            target = (path.parent / address).resolve() if address else path
            if not target.exists() or (anchor and anchor not in ids.get(target, ())):
                broken.append(f"{path.relative_to(site)}: {link}")
    linked = re.findall(r"\]\((\S+)\)", (site / "llms.txt").read_text())
    broken += [link for link in linked if not (site / link).is_file()]
    assert broken == []


def test_the_documented_classes_are_in_the_reference(site):
    reference = (site / "docs" / "api" / "runs.html").read_text()
    reference += (site / "docs" / "api" / "metrics.html").read_text()
    for name in (
        "jaxtrain.config.ConfigManager",
        "jaxtrain.trainer.TrainingOrchestrator.compute_auxiliary_loss",
        "jaxtrain.dpo_trainer.DPOTrainer.prepare_dataset",
        "jaxtrain.metrics.MetricsCalculator.log_metrics",
    ):
        assert f'id="{name}"' in reference, name
    # From the docstring, its section of arguments as fields.
    assert "Check and tokenize preference rows" in reference
    assert "rows, a <code" in reference
