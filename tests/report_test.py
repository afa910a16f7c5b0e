"""The report: what it reads, what it must never contain, and how a browser shows it."""

import html
import html.parser
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain import report
from jaxtrain.cli.ending import run_command
from jaxtrain.record.writers import make_writers
from jaxtrain.report import series
from jaxtrain.report.__main__ import main
from jaxtrain.report.samples import choose_samples

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NASTY = 'He said: </script><img src=x onerror="document.title=1"> & "so"\u2028.'


START = {
    "step": 0,
    "date": "2026-11-26T03:47:17+00:00",
    "command": "jaxtrain train",
    "versions": {"jax": "0.10.2", "numpy": "2.4.6"},
    "commit": {"id": "abc", "dirty": False},
    "devices": {"kind": "cpu", "count": 1},
    "data": {"train": {"path": None, "rows": 64, "fingerprint": "f00"}},
}


def write_run(
    workdir: pathlib.Path, *, rate: float = 1e-3, steps: int = 20, **more: Any
) -> None:
    training = {"training_type": "sft", "learning_rate": rate, "seed": 42, **more}
    config = {"training": training, "provenance": {"starts": [START]}}
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
    assert "nothing is not the work directory" in capsys.readouterr().err
    assert run_command(main, [str(tmp_path / "metrics.jsonl")]) == 2
    assert "is a file: name the work directory" in capsys.readouterr().err


@given(
    values=st.lists(
        st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)),
        min_size=50,
        max_size=300,
    ),
    most=st.integers(2, 49),
)
def test_thinning_keeps_the_first_the_last_the_least_and_the_greatest(values, most):
    points = list(enumerate(values))
    thinned = series.thin(points, most)
    assert thinned[0] == points[0] and thinned[-1] == points[-1]
    numbers = [value for value in values if value is not None]
    kept = [value for _, value in thinned if value is not None]
    assert bool(kept) == bool(numbers)
    if numbers:
        assert min(kept) == min(numbers) and max(kept) == max(numbers)
    assert set(thinned) <= set(points)
    assert [step for step, _ in thinned] == sorted({step for step, _ in thinned})
    # At most two numbers and a gap of each group, and both ends.
    assert len(kept) <= most + 2 and len(thinned) <= 1.5 * most + 4


def test_every_spike_stays_and_a_gap_is_no_number():
    points = [(n, math.sin(n)) for n in range(10_000)]
    spikes = {97 * n + 5: 9.0 + n for n in range(50)}
    points = [(n, spikes.get(n, value)) for n, value in points]
    points[5555] = (5555, None)
    thinned = dict(series.thin(points, 1000))
    assert all(thinned[step] == value for step, value in spikes.items())
    assert thinned[5555] is None


def test_numbers_are_shortened_to_six_digits():
    numbers = (2 / 3, 123456789.0, 5e-5, -0.0001234567, 3.0, 0.0, None)
    shown = [series.shorten(x) for x in numbers]
    assert shown == [0.666667, 123457000, 5e-5, -0.000123457, 3, 0, None]


def test_the_clock_keeps_both_sides_of_a_pause():
    """A step's time between two kept ones is interpolated: compare with the truth."""
    records = [
        {"step": n, "time": 50.0 + n + 86_400 * (n >= 1234), "num_tokens": 10.0 * n}
        for n in range(1, 5000)
    ]
    records.insert(7, {"step": 7, "time": 57.5, "eval_loss": 1.0})
    found = series.clock(records, 100)
    assert len(found["steps"]) < 150
    for record in records[::7]:
        at = np.interp(record["step"], found["steps"], found["seconds"])
        assert at == pytest.approx(record["time"] - 51.0, abs=1.0)
        tokens = np.interp(record["step"], found["steps"], found["tokens"])
        assert tokens == pytest.approx(10.0 * record["step"], rel=1e-4)
    assert "tokens" not in series.clock([{"step": 1, "time": 0.0}], 10)


def test_a_long_run_stays_under_4_mb_and_the_page_says_what_it_left_out(tmp_path):
    """20,000 records, 2,000 evaluations with samples: 22 MB as they are."""
    names = [f"metric_{i}" for i in range(12)]
    random = np.random.default_rng(0)
    workdir = tmp_path / "long"
    workdir.mkdir()
    lines, texts = [], []
    for step in range(1, 20_001):
        values = dict(zip(names, random.normal(size=12).tolist(), strict=True))
        record = {"step": step, "time": 1e9 + step, "loss": 3 + values["metric_0"]}
        lines.append({**record, "num_tokens": 4096.0 * step, **values})
        if step % 10 == 0:
            better = {"eval_loss": abs(step - 12_340) / 1e4 + 1, "eval_bleu": 1.0}
            lines.append({"step": step, "time": 1e9 + step + 0.5, **better})
            sample = {f"sample_{i}/output": f"<{step}> " * 500 for i in range(4)}
            texts.append({"step": step, "time": 1e9 + step, **sample})
    for name, rows in (("metrics", lines), ("samples", texts)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (workdir / f"{name}.jsonl").write_text(text)
    page = report.write_report([workdir])
    assert page.stat().st_size < 4e6
    run = data_of(page)["runs"][0]
    losses = [line["loss"] for line in lines if "loss" in line]
    kept = run["series"]["loss"][1]
    assert min(kept) == pytest.approx(min(losses), rel=1e-5)
    assert max(kept) == pytest.approx(max(losses), rel=1e-5)
    assert run["summary"]["best_step"] == 12_340
    shown = [sample["step"] for sample in run["samples"]]
    assert {10, 12_340, 20_000} <= set(shown)
    curves, samples = run["left_out"]
    assert f"of {len(losses):,} points" in curves
    assert f"Samples of {len(shown)} of 2,000 evaluations" in samples
    assert run["samples"][0]["texts"][0]["output"].endswith("more characters]")
    # Several runs share the page.
    both = report.write_report([workdir] * 2, tmp_path / "both.html")
    assert both.stat().st_size < 4e6


@pytest.mark.parametrize("most_bytes", [1, 3_000, 30_000, 10**9])
def test_samples_keep_to_their_bytes_and_are_the_first_the_best_and_the_last(
    most_bytes,
):
    lines = [{"step": n, "time": 0.0, "a/prompt": "<" * 100} for n in range(100)]
    chosen = choose_samples(lines, 37, most_bytes)
    steps = [sample["step"] for sample in chosen]
    size = len(json.dumps(chosen).replace("<", "......").encode())
    assert size <= most_bytes or steps == [99]
    assert steps == sorted(set(steps)) and steps[-1] == 99
    assert {0, 37} <= set(steps) or most_bytes < 3_000
    assert len(steps) in {1: {1}, 3_000: {3, 4}, 10**9: {60, 61}}.get(
        most_bytes, range(30, 60)
    )
    assert choose_samples([], None, most_bytes) == []


def test_a_short_run_is_shown_whole(page):
    assert [run["left_out"] for run in data_of(page)["runs"]] == [[], []]


def test_runs_differ_in_settings_versions_and_data(tmp_path):
    lora = {"enabled": True, "r": 16, "lora_alpha": 32}
    one = {"lr_scheduler_kwargs": {"num_cycles": 2}, "objective_kwargs": {"a": 1}}
    other = {"lr_scheduler_kwargs": None, "objective_kwargs": {}}
    write_run(tmp_path / "a", lora=lora, **one)
    write_run(tmp_path / "b", generation={"enabled": False}, **other)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    second = {
        **START,
        "step": 40,
        "versions": {"jax": "0.12.0", "numpy": "2.4.6"},
        "commit": {"id": "abc", "dirty": True},
    }
    config["provenance"]["starts"].append(second)
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    data = data_of(report.write_report([tmp_path / "a", tmp_path / "b"]))
    assert data["settingsThatDiffer"] == [
        ["training.lora", ["on", "off"]],
        ["training.lr_scheduler_kwargs.num_cycles", ["2", "–"]],
        ["training.objective_kwargs.a", ["1", "–"]],
    ]
    assert data["madeByThatDiffers"] == [
        ["commit", ['"abc"', '"abc with changes"']],
        ["versions.jax", ['"0.10.2"', '"0.12.0"']],
    ]
    assert data["runs"][0]["changes"] == []
    assert data["runs"][1]["changes"] == [
        'from step 40 on: commit "abc" → "abc with changes",'
        ' versions.jax "0.10.2" → "0.12.0"'
    ]
    keys = [key for key, _ in data["settings"]]
    assert "training.lora.r" in keys and "training.generation.enabled" not in keys
    assert not [key for key in keys if key.startswith("provenance")]


def test_a_run_of_an_older_version_has_no_provenance(tmp_path):
    write_run(tmp_path / "new")
    write_run(tmp_path / "old", run_name="an old one")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["provenance"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    data = data_of(report.write_report([tmp_path / "new", tmp_path / "old"]))
    assert ["versions.jax", ['"0.10.2"', "–"]] in data["madeByThatDiffers"]
    assert [run["name"] for run in data["runs"]] == ["new", "an old one"]


def data_of(page: pathlib.Path) -> dict[str, Any]:
    """What the page's script reads."""
    (data,) = re.findall(r"^const DATA = (.*);$", page.read_text("utf-8"), re.M)
    return json.loads(data)


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
    assert data_of(page)["runs"][0]["samples"][0]["texts"][0]["prompt"] == NASTY


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


# Appended to a page, it says in the title how wide the page is, and over which ticks.
MEASURE = """
<script>
setTimeout(() => {
  state.x = "%s"; drawCurves();
  setTimeout(() => {
    const { scrollWidth, clientWidth } = document.documentElement;
    const ticks = [...document.querySelectorAll('[data-plot="loss"] text.x')];
    document.title = JSON.stringify({ scrollWidth, clientWidth,
      ticks: ticks.map(text => text.textContent) });
  }, 200);
}, 300);
</script>
"""


def measure(page: pathlib.Path, tmp_path: pathlib.Path, x: str) -> dict[str, Any]:
    """The page's widths in a window of 500 pixels, and the ticks of its loss plot."""
    copy = tmp_path / f"{x}.html"
    script = MEASURE % x
    copy.write_text(page.read_text("utf-8").replace("</body>", f"{script}</body>"))
    found = browse(copy, tmp_path, "--window-size=500,900", "--dump-dom")
    return json.loads(html.unescape(re.findall(r"<title>(.*?)</title>", found)[0]))


def test_at_500_pixels_the_page_does_not_scroll_sideways_and_ticks_are_round(tmp_path):
    name = "a_run_name_without_any_place_to_break_" * 4
    write_run(tmp_path / ("folder_" * 20), run_name=name, dataset={"path": "x" * 300})
    workdir = tmp_path / ("folder_" * 20)
    lines = [
        {"step": 100 * n, "time": 1e9 + 90.0 * n, "loss": 1 / n, "num_tokens": 5e4 * n}
        for n in range(1, 100)
    ]
    with (workdir / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    page = report.write_report([workdir])
    for x, ticks in {
        "step": ["2k", "4k", "6k", "8k"],
        "tokens": ["1M", "2M", "3M", "4M"],
        "time": ["0 s", "1 h", "2 h"],
    }.items():
        found = measure(page, tmp_path, x)
        assert found["ticks"] == ticks
        assert found["scrollWidth"] <= found["clientWidth"] <= 500


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
