"""Whole runs whose work directory is in a bucket."""

import json
import pathlib
import sys

import pytest

from jaxtrain.storage import folders
from jaxtrain.storage.address import as_path

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import checkpoint_runs
from buckets import gs_bucket, s3_bucket

__all__ = ["gs_bucket", "s3_bucket"]


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


@pytest.mark.parametrize("kind", checkpoint_runs.TYPES)
def test_a_run_in_a_bucket_is_one_on_a_disk(kind, gs_bucket, tmp_path):
    _compare(kind, gs_bucket, tmp_path)


def test_a_run_on_s3_is_one_on_a_disk(s3_bucket, tmp_path):
    _compare("lora", s3_bucket, tmp_path)


def _compare(kind, bucket, tmp_path):
    """Start, stop, go on with nothing but the bucket; the same bits as on a disk."""
    expected = checkpoint_runs.train(config_of(kind), tmp_path / "disk")
    first = config_of(kind, max_steps=4, save_final_model=False)
    checkpoint_runs.train(first, bucket)
    results = checkpoint_runs.train(config_of(kind), bucket)
    home = as_path(bucket)
    assert results["model_path"] == f"{bucket}/model"
    assert results["final_loss"] == expected["final_loss"]
    assert losses(home)[-3:] == losses(tmp_path / "disk")[-3:]
    assert exported(home) == exported(tmp_path / "disk") != {}
    assert not (home / "run.lock").exists()
    found = {name.partition("/")[0] for name in folders.sizes(home)}
    assert {"metrics.jsonl", "config.json", "checkpoints", "exported.json"} <= found
    assert found <= {path.name for path in (tmp_path / "disk").iterdir()}
