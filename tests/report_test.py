"""The report: what it reads, what it must never contain, and how a browser shows it."""

import html.parser
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from jaxtrain import report
from jaxtrain.cli.ending import run_command
from jaxtrain.record.writers import make_writers
from jaxtrain.report.__main__ import main

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NASTY = 'He said: </script><img src=x onerror="document.title=1"> & "so"\u2028.'


def write_run(workdir: pathlib.Path, *, rate: float = 1e-3, steps: int = 20) -> None:
    config = {"training": {"training_type": "sft", "learning_rate": rate, "seed": 42}}
    with make_writers(["jsonl"], workdir, None, config) as writers:
        for step in range(1, steps + 1):
            loss = 4 / math.sqrt(step) + 100 * rate
            writers.write(
                step,
                {
                    "loss": math.nan if step == 7 else loss,
                    "perplexity": math.exp(loss),
                    "learning_rate": rate * (1 - step / steps),
                    "grad_norm": 1 / step,
                    "grad_norm/attention": 0.6 / step,
                    "grad_norm/mlp": 0.8 / step,
                    "tokens_per_sec": 12_345.0 + step,
                    "num_tokens": 1000.0 * step,
                    "step_time_p50_secs": 0.1,
                    "step_time_p90_secs": 0.2,
                },
            )
            if step % 5 == 0:
                writers.write(step, {"eval_loss": loss + 0.1, "eval_bleu": step / 2})
                sample = {"prompt": NASTY, "output": f"output at {step}"}
                writers.write_text(
                    step, {f"sample_1/{name}": text for name, text in sample.items()}
                )


@pytest.fixture
def page(tmp_path):
    write_run(tmp_path / "slow")
    write_run(tmp_path / "fast", rate=1e-2)
    return report.write_report([tmp_path / "slow", tmp_path / "fast"])


def test_a_summary_has_the_best_evaluation_and_median_rates(tmp_path):
    write_run(tmp_path / "run")
    summary = report.read_run(tmp_path / "run")["summary"]
    assert summary["type"] == "sft"
    assert (summary["steps"], summary["best_step"]) == (20, 20)
    assert summary["best_metric"] == "eval_loss"
    assert summary["best"] == pytest.approx(4 / math.sqrt(20) + 0.2)
    assert summary["tokens_per_sec"] == 12_345 + 11
    assert "mfu" not in summary


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"no metrics\.jsonl"):
        report.read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo')  # a first half line
    with pytest.raises(ValueError, match="no step yet"):
        report.read_run(tmp_path)
    assert run_command(main, [str(tmp_path / "nothing")]) == 2
    assert "nothing is no work directory" in capsys.readouterr().err


def test_thinning_keeps_evaluations_and_the_worst_losses():
    records = [{"step": n, "loss": 1.0} for n in range(1000)]
    records[333]["loss"] = 9.0
    records[555]["loss"] = None  # NaN
    records[777] = {"step": 777, "eval_loss": 2.0}
    thinned = report.thin(records, 100)
    assert len(thinned) <= 101
    steps = {r["step"] for r in thinned}
    assert {333, 555, 777} <= steps
    assert sorted(steps) == [r["step"] for r in thinned]


class Links(html.parser.HTMLParser):
    """Everything in a page that could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        names = ("src", "href", "srcset", "data", "action", "onerror")
        self.found += [f"{tag} {n}" for n, _ in attrs if n in names]


def test_the_page_loads_nothing_and_runs_no_text(page):
    text = page.read_text("utf-8")
    links = Links()
    links.feed(text)
    assert links.found == []
    assert "default-src 'none'" in text
    assert "onerror" in text and "<img" not in text  # it is data, not markup
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest", text)
    (data,) = re.findall(r"^const RUNS = (.*);$", text, re.M)
    assert json.loads(data)[0]["samples"][0]["texts"][0]["prompt"] == NASTY


def browse(page: pathlib.Path, tmp_path: pathlib.Path, *options: str) -> str:
    """What headless Chromium prints of a page."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1300,1200",
        "--virtual-time-budget=3000",
        *options,
        f"file://{page}",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# Appended to a page, it moves the mouse over the middle of the loss plot, as a user.
HOVER = """
<script>
setTimeout(() => {
  const svg = document.querySelector('[data-plot="loss"] div > svg[role=img]');
  const box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove",
    { clientX: box.left + box.width / 2, clientY: box.top + 50, bubbles: true }));
}, 300);
</script>
"""


def test_a_browser_draws_the_curves_and_tells_values_on_hover(page, tmp_path):
    page.write_text(page.read_text("utf-8").replace("</body>", HOVER + "</body>"))
    found = browse(page, tmp_path, "--dump-dom")
    found = re.sub(r"<script>.*?</script>", "", found, flags=re.S)
    assert "<title>slow, fast – training report</title>" in found
    plots = re.findall(r'data-plot="([^"]+)"', found)
    assert {"loss", "perplexity", "eval_bleu", "learning_rate"} <= set(plots)
    assert {"Gradient norm by group", "Step time (s)", "tokens_per_sec"} <= set(plots)
    loss = found.split('data-plot="loss"')[1].split("data-plot=")[0]
    paths = re.findall(r'<path d="(M[^"]+)"', loss)
    assert len(paths) == 4  # two runs, training and evaluation
    assert sorted(path.count("M") for path in paths) == [1, 1, 2, 2]  # NaN: a gap
    assert "NaN" not in "".join(paths)
    (tip,) = re.findall(r'class="tip".*', loss, re.S)
    assert re.search(r"step 1[01]<", tip)
    assert len(re.findall(r"<b>[\d.]+</b>", tip)) == 4
    # The summary, the differing settings, the last samples as text.
    for text in ("Comparison", "Settings that differ", "training.learning_rate"):
        assert text in found
    assert "output at 20" in found and "output at 15" not in found
    assert "&lt;/script&gt;&lt;img" in found
    differing = found.split("Settings that differ")[1].split("<details")[0]
    assert "training.seed" not in differing


def test_a_screenshot_shows_ink_in_light_and_in_dark(page, tmp_path):
    """Light and dark pages differ, and neither is blank."""
    image = pytest.importorskip("PIL.Image")
    means = []
    for scheme in (1, 0):  # light, dark
        target = tmp_path / f"{scheme}.png"
        browse(
            page,
            tmp_path,
            f"--screenshot={target}",
            f"--blink-settings=preferredColorScheme={scheme}",
        )
        picture = image.open(target).convert("L")
        colors = picture.getcolors(256)
        assert len(colors) > 50  # lines, text and their anti-aliasing
        means.append(sum(n * value for n, value in colors) / sum(n for n, _ in colors))
    assert means[0] > 200 and means[1] < 60


def test_the_command_writes_report_html(tmp_path):
    write_run(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-m", "jaxtrain.report", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=True,
        cwd=pathlib.Path(__file__).parent.parent,
        env=os.environ,
    )
    assert done.stdout.strip() == str(tmp_path / "run" / "report.html")
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
