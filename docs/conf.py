"""The documentation site, built by Sphinx: `bash docs/build.sh`.

The source directory is the repository's root, so a link between two pages is the same
path in the repository and on the site.
"""

import pathlib
import re
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jaxtrain  # noqa: E402

project = "jaxtrain"
author = "the jaxtrain authors"
release = version = jaxtrain.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/*.md",
    "launch/*.md",
    "docs/**.md",
    "docs/**.rst",
]

myst_heading_anchors = 4

# Docstrings are Google's style, and what they set in single backticks is code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"jaxtrain {release}"
html_extra_path = ["site"]
html_copy_source = False
html_show_copyright = False


def _escape_markup(*arguments: Any) -> None:
    """Let the bars and stars of equations in a docstring stand for themselves."""
    lines = arguments[-1]
    for number, line in enumerate(lines):
        parts = line.split("`")  # every second part is code
        parts[::2] = [re.sub(r"[|*]", r"\\\g<0>", part) for part in parts[::2]]
        lines[number] = "`".join(parts)


def _shorten_signature(*arguments: Any) -> tuple[str | None, str | None]:
    """Call an array an Array, and not by the module that happens to hold its class."""
    shorter = [part and part.replace("jaxlib._jax.", "") for part in arguments[-2:]]
    return shorter[0], shorter[1]


def _write_llms_txt(app: Any, error: Exception | None) -> None:
    """The repository's llms.txt, its links as they are on the site."""
    text = (ROOT / "llms.txt").read_text("utf-8")
    linked = text.replace(".md)", ".html)")
    pathlib.Path(app.outdir, "llms.txt").write_text(linked, encoding="utf-8")


def setup(app: Any) -> None:
    """Register what this page adds to Sphinx."""
    # Before napoleon, which makes markup of its own.
    app.connect("autodoc-process-docstring", _escape_markup, priority=400)
    app.connect("autodoc-process-signature", _shorten_signature)
    app.connect("build-finished", _write_llms_txt)
