"""The lock of a work directory in a bucket: one holder, whatever happens at once."""

import concurrent.futures
import dataclasses
import json
import pathlib
import sys
import time

import pytest

from jaxtrain.run import buffer, ledger, lock
from jaxtrain.storage import errors, objects
from jaxtrain.storage.address import as_path

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from buckets import Proxy, bucket, endpoint_of, serve, skip_unless_installed

__all__ = ["bucket"]


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(lock, "_SILENT_SECS", 0.8)
    monkeypatch.setattr(lock, "_POLL_SECS", 0.05)
    monkeypatch.setattr(lock, "_BEAT_SECS", 0.1)
    monkeypatch.setenv("JAXTRAIN_CACHE", str(tmp_path))


def hold(workdir):
    return lock.hold(as_path(workdir), is_first_process=True)


def write(workdir, **changes):
    """The lock of another run."""
    holder = dataclasses.replace(lock.Holder.of_this_process(), **changes)
    path = as_path(workdir) / lock.NAME
    path.write_text(json.dumps(dataclasses.asdict(holder)))
    return path


def test_conditions_hold(bucket):
    one = f"{bucket}/one"
    assert objects.read(one) is None
    assert objects.create(one, b"first") and not objects.create(one, b"second")
    first = objects.read(one)
    assert first.content == b"first" and abs(first.changed - time.time()) < 60
    assert objects.replace(one, b"second", first.version)
    assert not objects.replace(one, b"third", first.version)
    assert not objects.delete(one, first.version)
    second = objects.read(one)
    assert second.content == b"second"
    assert objects.delete(one, second.version) and objects.read(one) is None
    assert not objects.delete(one, second.version)


def test_a_run_holds_its_lock_renews_it_and_lets_it_go(bucket):
    with hold(bucket):
        path = as_path(bucket) / lock.NAME
        before = objects.read(path)
        with pytest.raises(ValueError, match="another run writes to it"):
            lock.refuse_if_held(as_path(bucket))
        until = time.monotonic() + 20
        while objects.read(path).version == before.version:
            assert time.monotonic() < until
            time.sleep(0.05)
    assert objects.read(path) is None


def test_of_many_that_find_a_silent_holder_one_goes_on(bucket):
    write(bucket, host="far")

    def try_it(_):
        try:
            with hold(bucket):
                time.sleep(2.0)
                return "held"
        except ValueError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        told = list(pool.map(try_it, range(4)))
    assert told.count("held") == 1, told
    assert sum("another run writes to it" in line for line in told) == 3, told


def test_a_holder_that_was_replaced_ends(bucket, monkeypatch):
    ended = []
    monkeypatch.setattr(lock, "_end_process", ended.append)
    with hold(bucket):
        path = write(bucket, host="far", token="other")
        until = time.monotonic() + 20
        while not ended:
            assert time.monotonic() < until
            time.sleep(0.05)
    assert "took this work directory over" in ended[0]
    assert objects.read(path) is not None  # it is the other's


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_lost_bucket_ends_the_run_and_names_the_last_step(scheme, monkeypatch):
    skip_unless_installed(scheme)
    ended = []
    monkeypatch.setattr(lock, "_end_process", ended.append)
    monkeypatch.setattr(errors, "LIMIT_SECS", 0.3)
    with (
        Proxy(endpoint_of(scheme), lambda *_: None) as proxy,
        serve(scheme, proxy.url) as there,
    ):
        home = as_path(f"{there}/lost-{time.time_ns()}")
        with hold(home):
            local = buffer.local_folder(home)
            local.mkdir(parents=True)
            ledger.note_saved(local / ledger.LEDGER, 40)
            proxy.fault = lambda *_: 403  # no retries: refused at once
            until = time.monotonic() + 20
            while not ended:
                assert time.monotonic() < until
                time.sleep(0.05)
            proxy.fault = lambda *_: None
    assert "step 40 is committed: the same command goes on from there" in ended[0]
