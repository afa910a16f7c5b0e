"""After any kill: each record once, an early stop where it was, exports whole.

Kills are exceptions at the place in question, in this process: SIGKILL of a whole
process is in trainer_test.py and checkpoint_test.py.
"""

import json
import math
import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import checkpoint_runs
from runs import records, weights

from jaxtrain.loop import Loop
from jaxtrain.record.writers import JsonlWriter, drop_lines_after
from jaxtrain.report import write_report
from jaxtrain.run import export, exported, lock
from jaxtrain.run.checkpoint import CheckpointManager
from jaxtrain.run.progress import BestMetric, Progress
from jaxtrain.run.window import MetricWindow
from jaxtrain.types import WeightedSum


class Killed(BaseException):
    """In place of SIGKILL."""


def kill_at(monkeypatch, step):
    start = Loop._start_step

    def start_or_die(self, *batch):
        if self.step == step:
            raise Killed
        start(self, *batch)

    monkeypatch.setattr(Loop, "_start_step", start_or_die)


def make_config(training_type="sft", **settings):
    config = checkpoint_runs.make_config(training_type)
    for name, value in settings.items():
        config.training[name] = value
    return config


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(other[name], value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 9 steps that nothing interrupts; float16 skips the first ones."""
    workdir = tmp_path_factory.mktemp("whole")
    results = checkpoint_runs.train(make_config(**WINDOWS), workdir)
    return workdir, results


# No two of these divide each other; and the last step is due for none of them.
WINDOWS = {"logging_steps": 4, "save_steps": 3, "eval_steps": 5, "max_steps": 8}


def test_a_window_survives_kills_inside_it_and_torn_lines(whole, tmp_path, monkeypatch):
    """Killed at 4 and 7, torn in between; started once more at the end."""
    workdir, results = whole
    expected = records(workdir)
    assert [(r["step"], "eval_loss" in r) for r in expected] == [
        *((4, False), (5, True), (8, False), (8, True))
    ]
    assert expected[0]["skipped_steps"] > 0  # in the window that is cut at step 3
    for step in (4, 7):
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            with pytest.raises(Killed):
                checkpoint_runs.train(make_config(**WINDOWS), tmp_path)
        with (tmp_path / "metrics.jsonl").open("ab") as file:
            file.write(b'{"step": 3, "loss": \xff\xfe')
    again = checkpoint_runs.train(make_config(**WINDOWS), tmp_path)
    assert records(tmp_path) == expected
    assert again["final_loss"] == results["final_loss"]
    assert_same_weights(tmp_path, workdir)


def test_a_finished_run_leaves_its_export_and_its_records(whole, caplog):
    workdir, results = whole
    before = {p: p.stat().st_mtime_ns for p in (workdir / "model").rglob("*")}
    lines = (workdir / "metrics.jsonl").read_bytes()
    caplog.set_level("INFO", "jaxtrain")
    again = checkpoint_runs.train(make_config(**WINDOWS), workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == lines
    assert {p: p.stat().st_mtime_ns for p in (workdir / "model").rglob("*")} == before
    assert "the export of step 8 is complete and stays as it is" in caplog.text
    for name in ("final_loss", "eval_loss", "best_metric", "model_path"):
        assert again[name] == results[name]
    # A file that is not what it was is written anew.
    (workdir / "model" / "config.json").write_text("{}")
    checkpoint_runs.train(make_config(**WINDOWS), workdir)
    assert json.loads((workdir / "model" / "config.json").read_text())


STOPPING = {
    "learning_rate": 0.0,
    "save_steps": 2,
    "eval_steps": 1,
    "logging_steps": 4,
    "early_stopping_patience": 2,
}


def test_an_early_stop_is_final_and_its_export_survives_a_kill(
    tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", "jaxtrain")
    train = checkpoint_runs.train
    save = exported.Exported.whole

    def killed(self, name):
        with save(self, name) as directory:
            yield directory
            assert lock.NAME in {path.name for path in tmp_path.iterdir()}
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(
            exported.Exported, "whole", exported.contextlib.contextmanager(killed)
        )
        with pytest.raises(Killed):
            train(make_config("lora", **STOPPING), tmp_path)
    assert not (tmp_path / lock.NAME).exists()
    assert (tmp_path / "adapter.partial").is_dir() and not (tmp_path / "model").exists()
    steps = [(r["step"], "eval_loss" in r) for r in records(tmp_path)]
    assert steps == [(1, True), (2, True), (3, True), (3, False)]
    again = train(make_config("lora", **STOPPING), tmp_path)
    assert (again["global_step"], again["ending"]) == (3, "stopped early")
    assert [(r["step"], "eval_loss" in r) for r in records(tmp_path)] == steps
    assert not list(tmp_path.glob("*.partial"))
    assert (again["best_model_step"], again["model_step"]) == (2, 3)
    names = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    exports = {"model", "adapter", "best_model", "best_adapter"}
    assert names == {"checkpoints", *exports}
    # More patience lets it go on, and so do more steps: each says why.
    more = STOPPING | {"early_stopping_patience": 3, "max_steps": 5}
    results = train(make_config("lora", **more), tmp_path)
    assert (results["global_step"], results["ending"]) == (4, "stopped early")
    key = "training.early_stopping_patience"
    assert f"goes on after its early stop at step 3: {key} is another" in caplog.text
    results = train(make_config("lora", **more | {"max_steps": 6}), tmp_path)
    assert (results["global_step"], results["ending"]) == (6, "finished")
    assert "early stop at step 4: training.max_steps is another" in caplog.text
    steps = [r["step"] for r in records(tmp_path) if "eval_loss" in r]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_evaluations_that_are_no_numbers_are_never_the_best(tmp_path, monkeypatch):
    """They neither block a save nor the end of the run; the first number wins."""
    values = iter([math.nan, -math.inf, 7.0, math.nan, 8.0])
    evaluate = Loop.evaluate

    def broken(self):
        from jaxtrain import loop

        value = next(values)
        with monkeypatch.context() as patch:
            patch.setattr(loop, "evaluate_sets", lambda *_, **__: {"eval_loss": value})
            evaluate(self)

    monkeypatch.setattr(Loop, "evaluate", broken)
    config = make_config(
        save_steps=1, eval_steps=1, max_steps=5, early_stopping_patience=2
    )
    config.training.early_stopping_patience = 5
    results = checkpoint_runs.train(config, tmp_path)
    assert (results["best_metric"], results["best_step"]) == (7.0, 3)
    assert results["saved_steps"] == [1, 2, 3, 4, 5]
    assert results["best_model_step"] == 3
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    kept = [json.loads(x)["eval_loss"] for x in lines if "eval_loss" in x]
    assert kept == [None, None, 7.0, None, 8.0]
    with CheckpointManager(tmp_path / "checkpoints", best_metric="eval_loss") as kept:
        assert kept.best_step() == 3


@pytest.mark.parametrize("greater", [False, True])
def test_the_best_is_a_number(greater):
    best = BestMetric(greater, patience=2)
    for step, value in enumerate((math.nan, math.inf, -math.inf), start=1):
        assert not best.update(value, step)
    assert best.value is None and best.should_stop
    assert best.update(3.0, 4) and (best.value, best.evaluations_since) == (3.0, 0)
    assert not best.update(math.inf if greater else -math.inf, 5)


def test_a_window_is_kept_to_the_bit_with_what_is_no_number():
    """Through JSON as strict as can be, between any two steps."""
    generator = np.random.default_rng(3)

    def sums(step):
        numbers = generator.standard_normal(10).astype(np.float32)
        values = iter(numbers * np.float32(1e-3))
        found = {
            name: WeightedSum(next(values), abs(next(values)))
            for name in ("loss", "entropy", "grad_norm", "learning_rate")
        }
        if step == 6:
            found["grad_norm"] = WeightedSum(np.float32(np.inf), np.float32(1))
        if step == 5:
            found["entropy"] = WeightedSum(np.float32(np.nan), np.float32(1))
        return found

    def means(window):
        return window.means(with_perplexity=True, added_losses={})

    steps = [sums(step) for step in range(7)]
    one = MetricWindow()
    for each in steps:
        one.add(each)
    for cut in range(7):
        first, second = MetricWindow(), MetricWindow()
        for each in steps[:cut]:
            first.add(each)
        first.skipped = cut
        second.set_state(json.loads(json.dumps(first.get_state(), allow_nan=False)))
        for each in steps[cut:]:
            second.add(each)
        np.testing.assert_equal(means(second), means(one))
        assert second.skipped == cut
    assert math.isnan(means(one)["entropy"])
    norm = steps[5]["grad_norm"]  # of the last step that did not overflow
    assert means(one)["grad_norm"] == float(norm.total) / float(norm.weight)
    progress = Progress(BestMetric(False), logged={"loss": math.nan}, window=one)
    kept = json.loads(json.dumps(progress.get_state(), allow_nan=False))
    again = Progress(BestMetric(False))
    again.set_state(kept)
    np.testing.assert_equal(again.get_state(), progress.get_state())


def test_lines_that_are_no_records_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "loss": 1}\n'
        b'{"step": 2, "loss": "\xc3"}\n'
        b"\x00\x00\x00\n"
        b'{"step": "2"}\n'
        b'["step"]\n'
        b'{"step": 2, "eval_loss": 2}\n'
        b'{"step": 2, "loss": 3}\n'
        b'{"step": 2, "loss": 3}\n'
        b'{"step": 2, "loss": 4'
    )
    drop_lines_after(path, 2)
    assert [tuple(json.loads(x).values()) for x in path.read_text().splitlines()] == [
        *((1, 1), (2, 2), (2, 3))
    ]


def test_half_a_surrogate_pair_is_written_and_shown(tmp_path):
    writer = JsonlWriter(tmp_path)
    text = "a \ud83d b \udc80"
    writer.write(1, {"loss": 1.0})
    writer.write_text(1, {"sample_1/output": text})
    writer.close()
    (line,) = (tmp_path / "samples.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["sample_1/output"] == text
    assert "a \\ud83d b \\udc80" in write_report([tmp_path]).read_text("utf-8")


def test_a_kill_between_two_renames_keeps_the_old_export(tmp_path):
    (tmp_path / "model.old").mkdir()
    (tmp_path / "model.old" / "config.json").write_text("{}")
    (tmp_path / "model.partial").mkdir()
    export.prepare(tmp_path, trains=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
