"""A work directory has one writer: who is refused, who is gone, who is faster."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from jaxtrain import cli
from jaxtrain.run import lock

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "_SILENT_SECS", 0.8)
    monkeypatch.setattr(lock, "_POLL_SECS", 0.02)
    monkeypatch.setattr(lock, "_BEAT_SECS", 0.05)


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def hold(workdir):
    return lock.hold(workdir, is_first_process=True)


def write(workdir, **changes):
    """The lock of another run."""
    holder = dataclasses.replace(lock.Holder.of_this_process(), **changes)
    (workdir / lock.NAME).write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def eventually(condition):
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def held(workdir):
    return (workdir / lock.NAME).exists()


def test_a_run_holds_its_directory_and_lets_it_go_whatever_ends_it(tmp_path):
    workdir = tmp_path / "new" / "run"
    with hold(workdir):
        assert held(workdir)
        told = rf"another run writes to it \(process {os.getpid()} on .*since 20"
        with pytest.raises(ValueError, match=told), hold(workdir):
            pass
        assert held(workdir)
        with lock.hold(workdir, is_first_process=False):  # another of the same run
            pass
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), hold(workdir):
            raise error
        assert list(workdir.iterdir()) == []


def test_a_process_of_this_machine_is_known_to_be_there_or_gone(tmp_path, sleeper):
    write(tmp_path, pid=sleeper.pid, started=lock._start_of(sleeper.pid))
    with pytest.raises(ValueError, match=f"process {sleeper.pid} on"):
        lock.refuse_if_held(tmp_path, may_wait=False)
    sleeper.kill()
    time.sleep(0.1)  # a zombie now, which nobody has waited for
    started = time.monotonic()
    with hold(tmp_path):
        assert time.monotonic() - started < 0.7  # nothing was waited for
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    # Another process of that number is another process.
    write(tmp_path, started="1")
    with hold(tmp_path):
        pass


@pytest.mark.parametrize("change", [{"host": "far"}, {"place": "another start"}])
def test_one_elsewhere_is_judged_by_its_beat(tmp_path, change):
    write(tmp_path, **change)
    path, beats = tmp_path / lock.NAME, threading.Event()

    def beat():
        while not beats.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ValueError, match=r"delete .*run\.lock"):
            lock.refuse_if_held(tmp_path)
        lock.refuse_if_held(tmp_path, may_wait=False)  # cannot be judged at once
    finally:
        beats.set()
        thread.join()
    started = time.monotonic()
    with hold(tmp_path):
        assert time.monotonic() - started > 0.8
    # After an hour nothing is waited for.
    write(tmp_path, **change)
    os.utime(path, (0, time.time() - 4000))
    started = time.monotonic()
    with hold(tmp_path):
        assert time.monotonic() - started < 0.7


@pytest.mark.parametrize("content", [b"\xff\x00", b'{"pid": 1}'])
def test_a_damaged_lock_is_judged_by_its_beat(tmp_path, content):
    (tmp_path / lock.NAME).write_bytes(content)
    with hold(tmp_path):
        assert held(tmp_path)


def test_a_holder_renews_its_lock_and_ends_where_another_has_it(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(lock, "_end_process", ended.append)
    path = tmp_path / lock.NAME
    with hold(tmp_path):
        path.unlink()
        eventually(lambda: held(tmp_path))  # deleted by hand, and made again
        before = path.stat().st_mtime_ns
        eventually(lambda: path.stat().st_mtime_ns > before)
        other = write(tmp_path, host="far", token="other")
        eventually(lambda: ended)
    assert len(ended) == 1 and f"{other} took this work directory over" in ended[0]
    assert held(tmp_path)  # it is the other's


def test_of_many_that_find_a_dead_holder_one_goes_on(tmp_path):
    write(tmp_path, pid=2**22 + 1)
    code = (
        "import pathlib, sys, time\n"
        "from jaxtrain.run import lock\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "try:\n"
        "    with lock.hold(pathlib.Path(sys.argv[1]), is_first_process=True):\n"
        "        sys.stdin.readline()\n"
        "        print('held')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    racing = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(6)
    ]
    for process in racing:
        assert process.stdout.readline() == "ready\n"
    for process in racing:
        process.stdin.write("\n")
        process.stdin.flush()
    eventually(lambda: sum(process.poll() is None for process in racing) <= 1)
    told = [process.communicate("\n")[0].strip() for process in racing]
    assert told.count("held") == 1, told
    assert sum("another run writes to it" in line for line in told) == 5, told
    assert list(tmp_path.iterdir()) == []


def test_the_command_names_the_holder_and_ends_with_2(tmp_path, sleeper, capsys):
    write(tmp_path, pid=sleeper.pid, started=lock._start_of(sleeper.pid))
    assert cli.main(["train", "sft", f"--workdir={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"process {sleeper.pid} on" in line and "another workdir" in line
    assert [path.name for path in tmp_path.iterdir()] == [lock.NAME]
