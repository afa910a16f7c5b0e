"""The last lines of a run: what came out, where it is, what to do next."""

import logging
import pathlib
import re
import shlex
import sys

import pytest

from jaxtrain.loop import Loop
from jaxtrain.record.summary import describe, format_count, format_duration
from jaxtrain.run.preemption import Preempted

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from preemption_test import sigterm_at
from runs import tiny_config, train

RESULTS = {
    "global_step": 80, "total_steps": 80, "ending": "finished",
    "best_metric": 1.23456, "best_metric_name": "eval_loss", "best_step": 60,
    "saved_steps": [60, 80], "num_tokens": 1_313_000.0, "skipped_steps": 0,
    "wall_secs": 724.2, "median_tokens_per_sec": 18_234.0,
}  # fmt: skip
EXPORTS = {
    "model_path": "out/dpo/model", "adapter_path": "out/dpo/adapter",
    "best_model_path": "out/dpo/best_model",
    "best_adapter_path": "out/dpo/best_adapter",
    "model_step": 80, "best_model_step": 60,
}  # fmt: skip
RUN = pathlib.Path("out/dpo")


def test_a_whole_summary():
    assert describe(RESULTS | EXPORTS, RUN) == [
        "finished at step 80 of 80: 12 min 4 s, 1.31M tokens, median 18.2k tokens/s",
        "best eval_loss: 1.235 at step 60, in out/dpo/best_model",
        "exported: out/dpo/model, out/dpo/adapter, out/dpo/best_model,"
        " out/dpo/best_adapter",
        "next: jaxtrain generate out/dpo, jaxtrain report out/dpo",
    ]


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"model_step": 60, "best_model_path": "out/dpo/model"}, "in out/dpo/model"),
        ({"best_model_step": 50}, "in out/dpo/checkpoints/60"),
        ({"best_model_step": 50, "saved_steps": [50, 80]}, "in no checkpoint; let"),
    ],
)
def test_it_says_where_the_best_weights_are(changes, place):
    assert place in describe(RESULTS | EXPORTS | changes, RUN)[1]


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        ({}, "jaxtrain export out/dpo --step=60"),
        ({"saved_steps": [80]}, "jaxtrain export out/dpo --step=80"),
        ({"saved_steps": []}, "next: jaxtrain report out/dpo"),
        ({"ending": "preempted"}, "start the same command again"),
    ],
)
def test_without_an_export_it_says_how_to_get_one(changes, command):
    assert command in describe(RESULTS | changes, RUN)[-1]


def test_long_paths_keep_it_narrow_and_short():
    run = pathlib.Path("/home/someone/experiments/2026-11/dpo with spaces")
    exports = {
        name: str(run / pathlib.Path(path).name) if isinstance(path, str) else path
        for name, path in EXPORTS.items()
    }
    lines = describe(RESULTS | exports | {"skipped_steps": 2}, run)
    assert max(map(len, lines)) <= 88
    (generate,) = [line for line in lines if "jaxtrain generate" in line]
    assert shlex.split(generate)[-1].rstrip(",") == str(run)
    assert "skipped steps: 2; the log names each" in lines


def test_a_run_without_evaluations_or_rates_has_a_summary_too():
    nothing = {"best_metric": None, "best_step": 0, "median_tokens_per_sec": None}
    assert describe(RESULTS | nothing | {"num_tokens": 0}, RUN) == [
        "finished at step 80 of 80: 12 min 4 s",
        "next: jaxtrain export out/dpo --step=80, jaxtrain report out/dpo",
    ]


@pytest.mark.parametrize(
    ("secs", "text"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"),
     (7384, "2 h 3 min"), (93_600, "1 d 2 h")],
)  # fmt: skip
def test_durations(secs, text):
    assert format_duration(secs) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(7, "7"), (812.4, "812"), (999.7, "1k"), (18_234, "18.2k"), (1_313_000, "1.31M"),
     (2.5e9, "2.5G")],
)  # fmt: skip
def test_counts(number, text):
    assert format_count(number) == text


def test_runs_end_with_it(tmp_path, monkeypatch, caplog):
    """Preempted, resumed to the end, and started once more with nothing left."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config("lora", eval_steps=4, save_steps=4)
    caplog.set_level(logging.INFO)

    def said():
        found = [r.message for r in caplog.records if r.name.endswith(".summary")]
        caplog.clear()
        return found

    with monkeypatch.context() as patch:
        sigterm_at(patch, 2)
        with pytest.raises(Preempted) as left:
            train(config, pathlib.Path("out"))
    assert left.value.results["global_step"] == 2
    lines = said()
    assert lines[0].startswith("stopped by SIGTERM and saved at step 2 of 8: ")
    assert "start the same command again" in lines[-1]

    results = train(config, pathlib.Path("out"))
    lines = said()
    assert re.fullmatch(
        r"finished at step 8 of 8: [\d.]+ s, [\d.]+k? tokens, median [\d.]+k? tokens/s",
        lines[0],
    )
    best = pathlib.Path(lines[1].rpartition(" in ")[2])
    assert (best / "model.safetensors").is_file()
    adapter = pathlib.Path(results["adapter_path"])
    assert (adapter / "adapter_model.safetensors").is_file()
    assert results["best_step"] in (4, 8)
    assert not pathlib.Path("out/profile").exists()  # off unless asked for

    monkeypatch.setattr(Loop, "_start_step", None)  # it would fail
    train(config, pathlib.Path("out"))
    told = [m for m in caplog.messages if "nothing left" in m]
    assert told == [
        "nothing left to train: step 8 of 8; raise training.max_steps or use a new"
        " workdir"
    ]
    lines = said()
    assert re.fullmatch(r"trained before, up to step 8 of 8: \S+ tokens", lines[0])
    assert lines[-1] == "next: jaxtrain generate out, jaxtrain report out"
