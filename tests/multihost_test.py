"""Real runs of several processes (CPU, gloo): killed, preempted, hung, resized."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import xla_flags
from runs import records, weights

pytestmark = pytest.mark.slow

RUN = pathlib.Path(__file__).with_name("multihost_run.py")
DEVICES = 4


def start(processes, *arguments):
    """Run all processes to their ends: (exit code, stderr) of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags.flags(DEVICES // processes),
        "JAXTRAIN_HEARTBEAT_TIMEOUT_SECS": "15",
    }
    started = []
    for rank in range(processes):
        cluster = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(rank),
        }
        started.append(
            subprocess.Popen(
                [sys.executable, str(RUN), *map(str, arguments)],
                env=environment | (cluster if processes > 1 else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        (process.returncode, output)
        for process, output in zip(started, outputs, strict=True)
    ]


def finish(processes, *arguments):
    for code, output in start(processes, *arguments):
        assert code == 0, output[-3000:]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Two processes of two devices, without interruption: its work directory."""
    workdir = tmp_path_factory.mktemp("whole")
    finish(2, "dpo", workdir)
    return workdir


def test_one_process_killed_and_all_restarted_is_bit_exact(whole_run, tmp_path):
    before = time.monotonic()
    ends = start(2, "dpo", tmp_path, "SIGKILL", 1, 5)
    codes = [code for code, _ in ends]
    assert codes[1] == -9, ends[1][1][-3000:]
    assert codes[0] not in (0, 75), "the survivor must not end as if all were well"
    assert time.monotonic() - before < 120
    assert (tmp_path / "checkpoints" / "3").is_dir()
    assert not (tmp_path / "model").exists()
    finish(2, "dpo", tmp_path)
    assert records(tmp_path) == records(whole_run)
    for name, value in weights(whole_run).items():
        np.testing.assert_array_equal(weights(tmp_path)[name], value)


def test_sigterm_to_one_process_saves_and_ends_all_then_other_counts_go_on(
    whole_run, tmp_path
):
    """Preempted as two processes, continued as one and as four: the data go on."""
    expected = records(whole_run)
    two = tmp_path / "two"
    ends = start(2, "dpo", two, "SIGTERM", 1, 4)
    assert [code for code, _ in ends] == [75, 75], ends[0][1][-3000:]
    saved = sorted(int(path.name) for path in (two / "checkpoints").glob("[0-9]*"))
    assert saved[0] == 3 and 4 <= saved[-1] < 8, saved
    assert [r["step"] for r in records(two)] == list(range(1, saved[-1] + 1))
    for processes in (1, 4):
        workdir = tmp_path / str(processes)
        shutil.copytree(two, workdir)
        finish(processes, "dpo", workdir)
        found = records(workdir)
        assert [r["step"] for r in found] == list(range(1, 9))
        for ours, theirs in zip(found, expected, strict=True):
            # Another order of float32 sums over devices.
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["num_tokens"] == theirs["num_tokens"]


def test_processes_may_share_rows(whole_run, tmp_path):
    """Each row over both processes, which read the same: the numbers of rows apart."""
    finish(2, "dpo", tmp_path, "split rows")
    for ours, theirs in zip(records(tmp_path), records(whole_run), strict=True):
        # Another order of float32 sums, eight steps on.
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["num_tokens"] == theirs["num_tokens"]


def test_a_process_that_hangs_ends_all_with_an_error(tmp_path):
    before = time.monotonic()
    ends = start(2, "sft", tmp_path, "hang", 0, 2)
    assert all(code != 0 for code, _ in ends)
    assert "Timeout" in ends[0][1] and "log_and_suffer" in ends[0][1]
    assert time.monotonic() - before < 250


def test_a_process_that_never_comes_is_an_error_soon(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "0",
        "JAXTRAIN_INIT_TIMEOUT_SECS": "3",
    }
    alone = subprocess.run(
        [sys.executable, str(RUN), "sft", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert alone.returncode not in (0, 75)
    assert "DEADLINE_EXCEEDED" in alone.stderr
