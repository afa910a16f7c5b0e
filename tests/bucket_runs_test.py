"""Whole runs whose work directory is in a bucket."""

import asyncio
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import types
import urllib.parse

import pytest

import jaxtrain
from jaxtrain.run.step_log import StepLog
from jaxtrain.storage import errors, folders
from jaxtrain.storage.address import as_path

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import checkpoint_runs
from buckets import (
    Proxy,
    endpoint_of,
    gs_bucket,
    s3_bucket,
    serve,
    skip_unless_installed,
)
from runs import act_at_log, interrupt

__all__ = ["gs_bucket", "s3_bucket"]
TREE = str(pathlib.Path(jaxtrain.__file__).parent.parent)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTRAIN_CACHE", str(tmp_path / "cache"))


def config_of(kind, **training):
    config = checkpoint_runs.make_config(kind)
    for name, value in {"save_steps": 2, "save_total_limit": 2, **training}.items():
        config.training[name] = value
    return config


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["step"], r.get("loss"), r.get("eval_loss")) for r in records]


def exported(workdir):
    """The bytes of all exported weights, by their paths."""
    return {
        f"{name}/{path}": (workdir / name / path).read_bytes()
        for name in ("model", "adapter", "best_model", "best_adapter")
        for path in _names(workdir / name)
        if path.endswith(".safetensors")
    }


def _names(folder):
    if isinstance(folder, pathlib.Path) and folder.is_absolute() and folder.exists():
        return [path.name for path in folder.iterdir()]
    return list(folders.sizes(folder)) if "://" in str(folder) else []


# Of sft in a faulty one below.
@pytest.mark.parametrize("kind", sorted({*checkpoint_runs.TYPES} - {"sft"}))
def test_a_run_in_a_bucket_is_one_on_a_disk(kind, gs_bucket, tmp_path, monkeypatch):
    _compare(kind, gs_bucket, tmp_path, monkeypatch)


def test_a_run_on_s3_is_one_on_a_disk(s3_bucket, tmp_path, monkeypatch):
    _compare("lora", s3_bucket, tmp_path, monkeypatch)


def _compare(kind, bucket, tmp_path, monkeypatch):
    """Start, stop, go on with nothing but the bucket; the same bits as on a disk."""
    expected = checkpoint_runs.train(config_of(kind), tmp_path / "disk")
    with monkeypatch.context() as patch:
        patch.setattr(StepLog, "ask", act_at_log(5, interrupt))
        with pytest.raises(KeyboardInterrupt):
            checkpoint_runs.train(config_of(kind), bucket)
    shutil.rmtree(tmp_path / "cache")
    results = checkpoint_runs.train(config_of(kind), bucket)
    home = as_path(bucket)
    assert results["model_path"] == f"{bucket}/model"
    assert results["final_loss"] == expected["final_loss"]
    assert losses(home) == losses(tmp_path / "disk")
    assert exported(home) == exported(tmp_path / "disk") != {}
    assert not (home / "run.lock").exists()
    found = {name.partition("/")[0] for name in folders.sizes(home)}
    assert {"metrics.jsonl", "config.json", "checkpoints", "exported.json"} <= found
    assert found <= {path.name for path in (tmp_path / "disk").iterdir()}


LOST = """
import asyncio, sys, types
import gcsfs.retry
from jaxtrain.run import lock
from jaxtrain.storage import errors

errors.LIMIT_SECS, lock._BEAT_SECS = 2.0, 0.2
# Its own six tries of a request take most of a minute.
gcsfs.retry.asyncio = types.SimpleNamespace(sleep=lambda secs: asyncio.sleep(0.01))
sys.path.insert(0, sys.argv[1])
import checkpoint_runs
from jaxtrain.cli.ending import run_command
from jaxtrain.record import logs

def train(arguments):
    logs.set_up()
    config = checkpoint_runs.make_config("sft")
    config.training.save_steps = 2
    checkpoint_runs.train(config, arguments[0])

sys.exit(run_command(train, [sys.argv[2]]))
"""


def test_a_bucket_that_is_lost_ends_the_run_and_names_the_last_step():
    skip_unless_installed("gs")
    committed = []

    def lose(command, path):
        # What follows the marker of step 4 finds no bucket.
        lost = bool(committed)
        name = urllib.parse.unquote(path)
        if command == "GET" and "/checkpoints/6" in name:
            committed.append(name)
        return "cut" if lost else None

    tests = str(pathlib.Path(__file__).parent)
    with (
        Proxy(endpoint_of("gs"), lose) as proxy,
        serve("gs", proxy.url) as there,
    ):
        told = subprocess.run(
            [sys.executable, "-c", LOST, tests, f"{there}/lost"],
            env={**os.environ, "PYTHONPATH": TREE},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert told.returncode == 1, told.stderr
    expected = "step 4 is committed: the same command goes on from there"
    assert expected in told.stderr, told.stderr
    assert "Traceback" not in told.stderr


def test_a_slow_and_faulty_bucket_changes_nothing(tmp_path, monkeypatch):
    """Some requests get 429 or 503, a cut connection or a late reply."""
    skip_unless_installed("gs")
    draws = random.Random(3)
    faults = [429, 503, "cut", 0.05]

    def harm(*_):
        return draws.choice(faults) if draws.random() < 0.04 else None

    # The libraries wait before they ask again, for seconds each time.
    retry = pytest.importorskip("gcsfs.retry")
    quick = types.SimpleNamespace(sleep=lambda _: asyncio.sleep(0.01))
    monkeypatch.setattr(retry, "asyncio", quick)
    monkeypatch.setattr(errors, "_FIRST_WAIT_SECS", 0.01)
    expected = checkpoint_runs.train(config_of("sft"), tmp_path / "disk")
    with (
        Proxy(endpoint_of("gs"), harm) as proxy,
        serve("gs", proxy.url) as there,
    ):
        home = f"{there}/faulty"
        results = checkpoint_runs.train(config_of("sft"), home)
        assert results["final_loss"] == expected["final_loss"]
        assert losses(as_path(home)) == losses(tmp_path / "disk")
        assert exported(as_path(home)) == exported(tmp_path / "disk")
    assert len(proxy.requests) > 100
