"""A disk that hangs as a run starts or exports ends it; a slow one does not."""

import os
import threading
import time
from unittest import mock

import pytest

from jaxtrain.config import resolve
from jaxtrain.run import disk_watch, preemption

TIMEOUT_SECS = 0.4


@pytest.fixture
def ended(monkeypatch):
    """Set when the process would have been ended, with exit code 1."""
    event = threading.Event()

    def leave(code: int) -> None:
        assert code == 1
        event.set()

    monkeypatch.setattr(disk_watch.os, "_exit", leave)
    return event


@pytest.fixture
def hangs(monkeypatch):
    """A function that lets a function of `os` wait until the test is over."""
    over = threading.Event()

    def let(name: str) -> None:
        monkeypatch.setattr(disk_watch.os, name, lambda *_: over.wait(60))

    yield let
    over.set()


def watch(written=(), read=()):
    return disk_watch.DiskWatch(written=written, read=read, timeout_secs=TIMEOUT_SECS)


@pytest.mark.parametrize("call", ["fsync", "preadv"])
def test_a_disk_that_hangs_is_named_and_ends_the_process(
    call, tmp_path, ended, hangs, capfd
):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    hangs(call)
    with watch([str(tmp_path / "run")], [str(model)]):
        assert ended.wait(20)
    told = capfd.readouterr().err
    silent = tmp_path / "run" if call == "fsync" else model
    assert told.startswith(f"error: {silent} has not answered for 0.4 s")
    assert "training.step_timeout_secs" in told and "as the run starts" in told
    assert "most recent call first" in told  # all stacks


def test_while_steps_are_watched_it_is_silent_and_then_looks_again(
    tmp_path, ended, hangs, capfd
):
    with watch([str(tmp_path)]):
        with preemption.Watchdog(0):
            time.sleep(TIMEOUT_SECS / 2)
            hangs("fsync")
            assert not ended.wait(3 * TIMEOUT_SECS)
        assert ended.wait(20)
    assert "as the run ends" in capfd.readouterr().err


def test_what_answers_with_an_error_is_no_disk_that_hangs(tmp_path, ended, monkeypatch):
    """A missing file, a pipe, an address, a full disk."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.jsonl").write_text("{}\n" * 5000)
    read = [str(tmp_path / name) for name in ("pipe", "empty", "a.jsonl", "none")]
    asked: list[int] = []

    def fail(descriptor: int) -> None:
        asked.append(descriptor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_watch.os, "fsync", fail)
    with watch([str(tmp_path / "not" / "yet"), "gs://bucket/run"], [*read, "s3://b/m"]):
        assert not ended.wait(3 * TIMEOUT_SECS)
    assert len(asked) > 1  # again and again
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.jsonl", "empty", "pipe",
    ]  # fmt: skip


def test_all_places_of_a_run_are_watched_and_none_without_a_limit(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("JAXTRAIN_CACHE", "caches")
    config = {
        "model": {"name_or_path": "models/a", "tokenizer_name_or_path": "tokens"},
        "data": {
            "train": [{"path": "a.jsonl", "weight": 1}, {"path": "b", "weight": 2}],
            "eval": {"one": "c.jsonl", "two": "d.jsonl"},
            "cache_dir": "cache",
        },
        "training": {"training_type": "sft", "step_timeout_secs": 7},
    }
    with mock.patch.object(disk_watch, "DiskWatch") as made:
        disk_watch.watch_disks(resolve(config), tmp_path)
    told = dict(made.call_args.kwargs)
    assert list(told["written"]) == [str(tmp_path), "cache", "caches"]
    read = ["models/a", "tokens", "a.jsonl", "b", "c.jsonl", "d.jsonl"]
    assert list(told["read"]) == read and told["timeout_secs"] == 7
    before = threading.active_count()
    with disk_watch.DiskWatch(written=[str(tmp_path)], read=[], timeout_secs=0):
        assert threading.active_count() == before
