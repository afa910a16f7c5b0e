"""Addresses, checks before a run, local copies, tries after faults."""

import importlib.util
import os
import pathlib
import sys

import jax
import pytest

from jaxtrain.storage import address, checks, errors, mirror

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from buckets import BUCKET, Proxy, bucket, endpoint_of, serve, skip_unless_installed

__all__ = ["bucket"]


@pytest.mark.parametrize("given", ["gs://b/run", "s3://b", "s3://b/run/"])
def test_an_address_stays_an_address(given):
    assert address.is_remote(given)
    skip_unless_installed(given[:2])
    path = address.as_path(given)
    assert str(path) == given.rstrip("/")
    assert address.is_remote(path)
    assert str(path / "x").startswith(given[:6])


@pytest.mark.parametrize("given", ["out/run", "/a/b", "~/x", "gs", "C:/a", "a:b"])
def test_a_folder_stays_a_folder(given):
    assert not address.is_remote(given)
    path = address.as_path(given)
    assert isinstance(path, pathlib.Path) and path.is_absolute()


@pytest.mark.parametrize(
    "given, told",
    [
        ("hdfs://b/run", "hdfs://.*cannot be used; give gs://"),
        (pathlib.Path("gs://b/run"), "has lost a slash"),
    ],
)
def test_what_is_neither_is_refused(given, told):
    with pytest.raises(ValueError, match=told):
        address.is_remote(given)
    with pytest.raises(ValueError, match="names no bucket"):
        address.split("gs://")


def test_join_and_name():
    assert address.join("gs://b/run/", "model", "x") == "gs://b/run/model/x"
    assert address.join("out", "model") == os.path.join("out", "model")
    assert address.name("gs://b/run/") == "run"
    assert address.name("gs://b") == "b"


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for check in (checks.check_readable, checks.check_writable):
        with pytest.raises(ValueError, match=r"workdir = .*pip install 'jaxtrain\[gcs"):
            check("gs://b/run", "workdir")


def test_what_is_there_can_be_read_and_written_to(bucket):
    checks.check_writable(bucket, "workdir")
    with pytest.raises(ValueError, match=f"{BUCKET}' has nothing of this name"):
        checks.check_readable(bucket, "model")
    address.as_path(f"{bucket}/folder/x.txt").write_text("x")
    for there in (bucket, f"{bucket}/folder", f"{bucket}/folder/x.txt"):
        checks.check_readable(there, "model")
    assert [p.name for p in address.as_path(bucket).iterdir()] == ["folder"]


@pytest.mark.parametrize("check", [checks.check_readable, checks.check_writable])
def test_a_missing_bucket_is_named(bucket, check):
    scheme = bucket[:2]
    told = r"^workdir = .*there is no bucket 'none'[^\n]*$"
    with pytest.raises(ValueError, match=told):
        check(f"{scheme}://none/run", "workdir")


@pytest.mark.parametrize("scheme", ["gs", "s3"])
@pytest.mark.parametrize(
    "status, told", [(403, "may not be written to"), (401, "no valid credentials")]
)
def test_a_refusal_is_told_in_one_line(scheme, status, told):
    skip_unless_installed(scheme)
    with (
        Proxy(endpoint_of(scheme), lambda *_: status) as proxy,
        serve(scheme, proxy.url) as there,
        pytest.raises(ValueError, match=rf"^workdir = [^\n]*{told}[^\n]*$"),
    ):
        checks.check_writable(f"{there}/run", "workdir")


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_no_answer_is_not_waited_for(scheme, monkeypatch):
    skip_unless_installed(scheme)
    monkeypatch.setattr(checks, "TIMEOUT_SECS", 0.3)
    with (
        Proxy(endpoint_of(scheme), lambda *_: 1.0) as proxy,
        serve(scheme, proxy.url) as there,
        pytest.raises(ValueError, match="no answer from the bucket"),
    ):
        checks.check_writable(f"{there}/run", "workdir")


def test_a_local_copy_is_fresh_and_whole(bucket, tmp_path, monkeypatch):
    file = address.as_path(f"{bucket}/model/config.json")
    file.write_text("{}")
    copy = mirror.mirror(f"{bucket}/model", tmp_path)
    assert copy.name == "model" and (copy / "config.json").read_text() == "{}"
    assert mirror.mirror(str(file), tmp_path).read_text() == "{}"
    copies = []
    monkeypatch.setattr(mirror, "_copy", lambda file, target: copies.append(file))
    mirror.mirror(f"{bucket}/model", tmp_path)
    assert not copies
    monkeypatch.undo()
    file.write_text("[]")
    changed = mirror.mirror(f"{bucket}/model", tmp_path)
    assert (changed / "config.json").read_text() == "[]"
    with pytest.raises(FileNotFoundError, match="there is nothing of this name"):
        mirror.mirror(f"{bucket}/none", tmp_path)


def test_a_process_that_waits_for_another_has_not_lost_its_bucket():
    text = "UNKNOWN: Gloo context initialization failed: DEADLINE_EXCEEDED: Timed out"
    assert not errors.is_network(jax.errors.JaxRuntimeError(text))
    assert errors.is_network(ValueError(text))  # as TensorStore says it


def test_faults_of_the_network_are_tried_again_within_a_limit(monkeypatch):
    monkeypatch.setattr(errors.time, "sleep", lambda secs: None)
    calls = []

    def fail_twice():
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionResetError("cut")
        return "done"

    assert errors.retrying(fail_twice, "a try") == "done"
    with pytest.raises(FileNotFoundError):
        errors.retrying(lambda: (_ for _ in ()).throw(FileNotFoundError("x")), "a try")
    now = iter(range(0, 10_000, 100))
    monkeypatch.setattr(errors.time, "monotonic", lambda: next(now))
    with pytest.raises(TimeoutError):
        errors.retrying(lambda: (_ for _ in ()).throw(TimeoutError("x")), "a try")


@pytest.mark.parametrize(
    "scheme, fault", [("gs", 429), ("gs", "cut"), ("s3", 503), ("s3", "cut")]
)
def test_a_busy_server_is_asked_again(scheme, fault):
    skip_unless_installed(scheme)
    left = [fault, fault]
    with (
        Proxy(endpoint_of(scheme), lambda *_: left.pop() if left else None) as proxy,
        serve(scheme, proxy.url) as there,
    ):
        path = address.as_path(f"{there}/busy-{fault}")
        errors.retrying(lambda: path.write_text("x"), "writing")
        assert path.read_text() == "x" and not left
