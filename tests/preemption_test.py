"""SIGTERM and hangs in one process; several are in multihost_test."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from jaxtrain.record.goodput import Goodput
from jaxtrain.run.preemption import EXIT_CODE, Preempted, PreemptionWatch, Watchdog
from jaxtrain.run.step_log import StepLog

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from runs import STEPS, act_at_log, tiny_config, train


def sigterm_at(monkeypatch, step):
    """The signal arrives as `step` is logged."""

    def send():
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StepLog, "ask", act_at_log(step, send))


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r["loss"]) for r in map(json.loads, lines)]


@pytest.mark.slow
def test_sigterm_saves_whatever_save_steps_says_and_the_next_start_goes_on(
    monkeypatch, tmp_path
):
    config = tiny_config("from_scratch", save_steps=0)
    train(config, tmp_path / "whole")
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        sigterm_at(patch, 4)
        with pytest.raises(Preempted) as left:
            train(config, tmp_path / "left")
    assert left.value.code == EXIT_CODE == 75
    assert left.value.step == 4
    assert (tmp_path / "left" / "checkpoints" / "4").is_dir()
    assert not (tmp_path / "left" / "model").exists()
    assert signal.getsignal(signal.SIGTERM) is before
    results = train(config, tmp_path / "left")
    assert results["global_step"] == STEPS
    assert losses(tmp_path / "left") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_the_log_has_the_goodput_and_it_survives_a_restart(monkeypatch, tmp_path):
    config = tiny_config("from_scratch")
    with monkeypatch.context() as patch:
        sigterm_at(patch, 4)
        with pytest.raises(Preempted):
            train(config, tmp_path)
    restored = []
    set_state = Goodput.set_state
    monkeypatch.setattr(
        Goodput,
        "set_state",
        lambda self, state: (restored.append(state), set_state(self, state)),
    )
    train(config, tmp_path)
    assert restored[0]["productive_secs"] > 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    shares = [json.loads(line)["goodput_share"] for line in lines]
    assert shares[0] == 0.0  # the first step compiled
    assert all(0 < share < 1 for share in shares[1:])


def test_goodput_counts_downtime_and_repeated_steps_as_lost():
    now = [100.0]
    first = Goodput(lambda: now[0])
    now[0] = 110.0
    first.add(6.0)
    assert first.share() == pytest.approx(0.6)
    saved = first.get_state()
    now[0] = 115.0
    first.add(5.0)  # after the checkpoint: lost with the process
    now[0] = 120.0
    second = Goodput(lambda: now[0])
    second.set_state(saved)
    now[0] = 130.0
    second.add(6.0)
    assert second.share() == pytest.approx(12 / 30)


def test_outside_the_main_thread_signals_are_left_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def enter():
        with PreemptionWatch() as watch:
            seen.append((signal.getsignal(signal.SIGTERM), watch.requested(1)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def run_watched(body):
    code = f"""
import time
from jaxtrain.run.preemption import Watchdog
def stuck():
    time.sleep(20)
with Watchdog(1.0) as watchdog:
{body}
print("left")
"""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )


def test_a_hang_ends_the_process_with_its_stacks():
    ended = run_watched("    stuck()")
    assert ended.returncode == 1
    assert "Timeout (0:00:01)!" in ended.stderr and "in stuck" in ended.stderr
    told, *stacks = ended.stderr.splitlines()
    assert "nothing was finished for 1 s (training.step_timeout_secs)" in told
    assert "give the same command again" in told and "error: " not in str(stacks)
    assert ended.stdout == ""


def test_a_fed_watchdog_lets_be():
    body = "    for _ in range(6):\n        time.sleep(0.3)\n        watchdog.feed()"
    ended = run_watched(body)
    assert (ended.returncode, ended.stdout) == (0, "left\n")


def test_sigterm_as_a_run_starts_ends_it_with_75_and_one_line(tmp_path):
    """It comes as the model is loaded, before there is a step to finish."""
    code = f"""
import os, signal, sys
from jaxtrain import main
from jaxtrain.cli.ending import run_command
from jaxtrain.models import load
load.load_model = lambda run: os.kill(os.getpid(), signal.SIGTERM)
sys.argv[1:] = ["from_scratch", "--workdir={tmp_path / "run"}"]
sys.exit(run_command(main.main))
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert ended.returncode == EXIT_CODE, ended.stderr
    told = "SIGTERM: leaving; the same command goes on from what is saved"
    assert ended.stderr.splitlines()[-1] == told
    assert not (tmp_path / "run" / "run.lock").exists()


def test_a_watchdog_of_no_time_watches_nothing():
    with Watchdog(0) as watchdog:
        watchdog.feed()
