"""Run a notebook's cells in this process, and keep what they printed and drew.

    python tests/notebooks.py launch/colab.ipynb

runs the notebook as it stands, but for the cells with a tag, and stores the outputs and
the seconds of each cell in it. Nothing of Jupyter is needed.
"""

import base64
import contextlib
import hashlib
import io
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

Notebook = dict[str, Any]


def read(path: pathlib.Path) -> Notebook:
    """The notebook of a file."""
    notebook: Notebook = json.loads(path.read_text("utf-8"))
    return notebook


def code_cells(notebook: Notebook, tag: str = "") -> list[dict[str, Any]]:
    """The cells of code that have the tag; without one, those that are not tagged."""
    return [
        cell
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
        and (tag in cell["metadata"].get("tags", ()) if tag else not _tags(cell))
    ]


def source(cell: dict[str, Any]) -> str:
    """The text of a cell."""
    return "".join(cell["source"])


def digest(notebook: Notebook) -> str:
    """A hash of the code that runs, so that outputs can be told to be of it."""
    text = "\0".join(source(cell) for cell in code_cells(notebook))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run(
    notebook: Notebook, change: Callable[[str], str] = lambda text: text
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]], float, dict[str, Any]]]:
    """Run the untagged cells in the current directory, one for each `next`.

    Args:
        change: what is done to a cell's text before it runs.

    Yields:
        The cell, its outputs as nbformat has them, its seconds, and all names so far.
    """
    names: dict[str, Any] = {"__name__": "notebook"}
    for cell in code_cells(notebook):
        printed, drawn = io.StringIO(), list[dict[str, Any]]()
        start = time.perf_counter()
        with contextlib.redirect_stdout(printed), _showing(drawn):
            exec(compile(change(source(cell)), "cell", "exec"), names)
        seconds = time.perf_counter() - start
        outputs = list(drawn)
        if printed.getvalue():
            lines = printed.getvalue().splitlines(keepends=True)
            outputs.append({"output_type": "stream", "name": "stdout", "text": lines})
        yield cell, outputs, seconds, names


@contextlib.contextmanager
def _showing(drawn: list[dict[str, Any]]) -> Iterator[None]:
    """Let `plt.show()` append its figures to `drawn`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def show() -> None:
        for number in pyplot.get_fignums():
            picture = io.BytesIO()
            pyplot.figure(number).savefig(picture, format="png", dpi=72)
            data = {
                "image/png": base64.b64encode(picture.getvalue()).decode(),
                "text/plain": ["<Figure>"],
            }
            drawn.append({"output_type": "display_data", "data": data, "metadata": {}})
        pyplot.close("all")

    before, pyplot.show = pyplot.show, show
    try:
        yield
    finally:
        pyplot.show = before


def store(path: pathlib.Path) -> None:
    """Run the notebook in an empty folder and write its outputs into the file."""
    notebook, folder = read(path), tempfile.mkdtemp()
    path = path.resolve()
    os.chdir(folder)
    for number, (cell, outputs, seconds, _) in enumerate(run(notebook), 1):
        cell["outputs"], cell["execution_count"] = outputs, number
        cell["metadata"]["seconds"] = round(seconds, 1)
        print(f"cell {number}: {seconds:.1f} s", flush=True)
    notebook["metadata"]["outputs_of"] = digest(notebook)
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def _tags(cell: dict[str, Any]) -> list[str]:
    tags: list[str] = cell["metadata"].get("tags", [])
    return tags


if __name__ == "__main__":
    store(pathlib.Path(sys.argv[1]))
