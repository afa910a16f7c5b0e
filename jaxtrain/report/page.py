"""Write an HTML report of one or more runs: `python -m jaxtrain.report WORKDIR...`.

The page is a single file that contains its data, style and script, and it loads nothing
else. It shows curves, throughput, sample outputs and the configuration. A page of
several runs draws each metric of all runs in one plot and lists the settings in which
the runs differ.
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtrain.config.eval_sets import names_in
from jaxtrain.report import series, settings
from jaxtrain.report.samples import choose_samples

_PAGE = pathlib.Path(__file__).with_name("page.html")
_PLACE = "/*JAXTRAIN_DATA*/null"
_SAMPLE_BYTES_OF_A_PAGE = 1_000_000


def read_run(workdir: pathlib.Path, *, runs_of_the_page: int = 1) -> dict[str, Any]:
    """Read what `JsonlWriter` wrote to a work directory, as data for the page's script.

    Curves and samples are thinned out, more so if more runs share the page, and
    `left_out` tells the reader.

    Raises:
        ValueError: the directory has no metrics.
    """
    path, samples = workdir / "metrics.jsonl", workdir / "samples.jsonl"
    if workdir.is_file():
        raise ValueError(
            f"{workdir} is a file: name the work directory of a run, such as"
            f" {workdir.parent}"
        )
    if not path.is_file():
        raise ValueError(
            f"{workdir} is not the work directory of a run: it has no metrics.jsonl."
            " Give the --workdir with which a run was trained"
        )
    records = _read_lines(path)
    if not records:
        raise ValueError(f"{path} is empty: the run has logged no step yet")
    config_file = workdir / "config.json"
    config = json.loads(config_file.read_text("utf-8")) if config_file.is_file() else {}
    starts = settings.starts_of(config)
    summary = summarize(records, config)
    texts = _read_lines(samples) if samples.is_file() else []
    chosen = choose_samples(
        texts, summary.get("best_step"), _SAMPLE_BYTES_OF_A_PAGE // runs_of_the_page
    )
    curves = series.points_of(records)
    most = series.points_for_each(len(curves) * runs_of_the_page)
    thinned = {name: series.thin(points, most) for name, points in curves.items()}
    folder = workdir.resolve().name
    return {
        "name": config.get("training", {}).get("run_name") or folder,
        "folder": folder,
        "path": str(workdir),
        "config": settings.settings_of(config),
        "made_by": settings.made_by(starts[-1]) if starts else {},
        "changes": settings.changes_between(starts),
        "eval_sets": names_in([name for name in curves if name.startswith("eval_")]),
        "series": {name: series.columns(points) for name, points in thinned.items()},
        "clock": series.clock(records, most),
        "last_time": records[-1]["time"],
        "samples": chosen,
        "left_out": _left_out(curves, thinned, len(texts), len(chosen)),
        "summary": summary,
    }


def _left_out(
    curves: Mapping[str, list[series.Point]],
    thinned: Mapping[str, list[series.Point]],
    samples: int,
    chosen: int,
) -> list[str]:
    """Sentences that tell what the page leaves out of a run."""
    told = []
    longest = max(curves, key=lambda name: len(curves[name]), default="")
    if longest and len(thinned[longest]) < len(curves[longest]):
        told.append(
            f"Curves show up to {len(thinned[longest]):,} of {len(curves[longest]):,}"
            " points, every highest and lowest among them; metrics.jsonl has all."
        )
    if chosen < samples:
        told.append(
            f"Samples of {chosen:,} of {samples:,} evaluations are shown;"
            " samples.jsonl has all, and long texts whole."
        )
    return told


def summarize(
    records: Sequence[Mapping[str, Any]], config: Mapping[str, Any]
) -> dict[str, Any]:
    """The numbers of a run that are compared first; unknown ones are left out."""
    training = config.get("training", {})
    summary: dict[str, Any] = {"type": training.get("training_type")}
    summary["steps"] = records[-1].get("step")
    summary["seconds"] = records[-1]["time"] - records[0]["time"]
    for name in ("loss", "num_tokens"):
        if values := _numbers(records, name):
            summary[name], _ = values[-1]
    metric = training.get("metric_for_best_model", "eval_loss")
    metric = f"eval_{metric.removeprefix('eval_')}"
    if values := _numbers(records, metric):
        choose = max if training.get("greater_is_better") else min
        best, step = choose(values, key=lambda pair: pair[0])
        summary |= {"best_metric": metric, "best": best, "best_step": step}
    for name in ("tokens_per_sec", "samples_per_sec", "mfu"):
        if rates := sorted(_numbers(records, name)):
            summary[name], _ = rates[len(rates) // 2]
    if peaks := _numbers(records, "device_memory_peak_gib"):
        summary["device_memory_peak_gib"], _ = max(peaks)
    return {name: value for name, value in summary.items() if value is not None}


def _numbers(
    records: Sequence[Mapping[str, Any]], name: str
) -> list[tuple[float, int]]:
    """(value, step) of all records that have a finite number of this name."""
    return [
        (record[name], record["step"])
        for record in records
        if isinstance(record.get(name), int | float) and math.isfinite(record[name])
    ]


def make_page(runs: Sequence[Mapping[str, Any]]) -> str:
    """Render runs, as returned by `read_run`, as HTML; their names are made unique."""
    names = [run["name"] for run in runs]
    shown = [
        {
            **{key: run[key] for key in run if key not in ("config", "made_by")},
            "name": run["path" if names.count(run["name"]) > 1 else "name"],
        }
        for run in runs
    ]
    configs = [run["config"] for run in runs]
    makers = [run["made_by"] for run in runs]
    data = json.dumps(
        {
            "runs": shown,
            "settings": settings.rows_of(configs),
            "madeBy": settings.rows_of(makers),
            "settingsThatDiffer": settings.differing(configs),
            "madeByThatDiffers": settings.differing(makers),
        },
        ensure_ascii=False,
        allow_nan=False,
        separators=(",", ":"),
    )
    # A text in the data must not end the script that holds it.
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028")
    page = _PAGE.read_text("utf-8")
    assert page.count(_PLACE) == 1
    return page.replace(_PLACE, data)


def write_report(
    workdirs: Sequence[pathlib.Path], output: pathlib.Path | None = None
) -> pathlib.Path:
    """Write the page, by default as report.html in the first directory.

    Raises:
        ValueError: a directory holds no run.
    """
    count = len(workdirs)
    runs = [read_run(workdir, runs_of_the_page=count) for workdir in workdirs]
    path = output or workdirs[0] / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Half of a surrogate pair, which UTF-8 lacks, becomes JSON's own escape.
    path.write_bytes(make_page(runs).encode(errors="backslashreplace"))
    return path


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Read all complete JSON lines; a run in progress may have written half a line."""
    found = []
    # Not splitlines, for which U+2028 in a text ends a line too.
    for line in path.read_bytes().decode(errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            found.append(record)
    return found
