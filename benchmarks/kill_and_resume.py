"""Kill one of several processes, a GPU each, and resume: is everything as without?

    PYTHONPATH=. python benchmarks/kill_and_resume.py DIR --processes 2

Trains the model that comes with jaxtrain (DPO, `mesh.fsdp` over all processes) by
`jaxtrain train`: once without a break, and once with SIGKILL to the last process while
it is amid its steps. The others have to end with an error. From copies of what is left:

- as many processes go on, and losses and weights have to be those of the unbroken run,
  bit for bit;
- one process goes on with one GPU, twice at once and so with programs compiled twice
  (`training.full_determinism`), and both have to agree bit for bit;
- as many processes and one go on in float32, and have to agree to 1e-4 of each loss.
  Sums in another order differ by some 1e-6 in float32 (CPUs), by 3e-4 in bfloat16.

A line for each check; exits with 1 if one fails. On a machine without GPUs each process
has a CPU device.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import numpy as np

STEPS, KILLED_AT, SAVED_EACH, EXAMPLES = 16, 9, 4, 4
_LIMIT_SECS = 400.0
# Endings of what the log says of clocks and machines, and the beginning.
_TIMES = ("time", "_per_sec", "_secs", "_share", "_gib", "mfu")
_OF_GPUS = "gpu_"


def command(workdir: pathlib.Path, devices: int, exact: bool) -> list[str]:
    """The training, of so many devices in all, and the same examples a step.

    `exact`: in float32. Else as it comes, in bfloat16.
    """
    return [
        *(sys.executable, "-m", "jaxtrain", "train", "dpo", f"--workdir={workdir}"),
        f"--mesh.fsdp={devices}",
        f"--training.per_device_train_batch_size={EXAMPLES // devices}",
        *(f"--training.max_steps={STEPS}", "--training.logging_steps=1"),
        *(f"--training.save_steps={SAVED_EACH}", "--training.eval_steps=0"),
        *("--data.max_train_rows=64", "--data.max_length=192", "--data.packing=false"),
        *(["--training.full_determinism=true"] if devices == 1 else []),
        *(["--training.bf16=false"] if exact else []),
    ]


@contextlib.contextmanager
def started(
    workdir: pathlib.Path, processes: int, first_gpu: int = 0, exact: bool = False
) -> Any:
    """All processes of a training, each with a device; ended when the block ends."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    running = []
    workdir.mkdir(parents=True, exist_ok=True)
    for rank in range(processes):
        own = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": gpus()[first_gpu + rank] if gpus() else "",
            "JAXTRAIN_HEARTBEAT_TIMEOUT_SECS": "15",
            **({"JAX_DEFAULT_MATMUL_PRECISION": "highest"} if exact else {}),
        }
        if processes > 1:
            own |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(rank),
            }
        with workdir.with_suffix(f".{rank}.log").open("a") as log:
            running.append(
                subprocess.Popen(
                    command(workdir, processes, exact), env=own, stdout=log, stderr=log
                )
            )
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs; none if jax shall run on CPUs."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return []
    if listed := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return listed.split(",")
    try:
        query = ["nvidia-smi", "--list-gpus"]
        found = subprocess.run(query, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(number) for number, _ in enumerate(found.stdout.splitlines())]


def finish(
    workdir: pathlib.Path, processes: int, first_gpu: int = 0, exact: bool = False
) -> None:
    """Train to the end, on so many GPUs from the first one on.

    Raises:
        RuntimeError: a process failed, with the end of what it said.
    """
    with started(workdir, processes, first_gpu, exact) as running:
        for rank, process in enumerate(running):
            if code := process.wait(_LIMIT_SECS):
                raise RuntimeError(f"exit code {code}: {last_words(workdir, rank)}")


def kill(workdir: pathlib.Path, processes: int) -> list[int]:
    """Train, and kill the last process after `KILLED_AT` steps; all exit codes.

    Raises:
        RuntimeError: the run was over, or stood still, before it came to that.
    """
    until = time.monotonic() + _LIMIT_SECS
    with started(workdir, processes) as running:
        while len(log_of(workdir)) < KILLED_AT:
            ended = any(process.poll() is not None for process in running)
            if ended or time.monotonic() > until:
                raise RuntimeError(f"no step {KILLED_AT}: {last_words(workdir, 0)}")
            time.sleep(0.005)
        running[-1].send_signal(signal.SIGKILL)
        return [process.wait(_LIMIT_SECS) for process in running]


def last_words(workdir: pathlib.Path, rank: int) -> str:
    """The last lines of what a process printed, without C++ frames."""
    text = workdir.with_suffix(f".{rank}.log").read_text(errors="replace")
    lines = [line.strip()[:300] for line in text.splitlines()]
    told = [line for line in lines if line and not re.match(r"@ |\*\*\*|PC:", line)]
    return " / ".join(told[-3:])


def log_of(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The log's lines of steps, without what the clock says; none where none is."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = map(json.loads, path.read_text().rpartition("\n")[0].splitlines())
    return [
        {
            name: value
            for name, value in line.items()
            if not name.endswith(_TIMES) and not name.startswith(_OF_GPUS)
        }
        for line in lines
        if "loss" in line
    ]


def same_weights(left: pathlib.Path, right: pathlib.Path) -> bool:
    """Whether two runs exported the same weights, bit for bit."""
    import safetensors.numpy

    def read(workdir: pathlib.Path) -> dict[str, np.ndarray]:
        files = sorted((workdir / "model").glob("*.safetensors"))
        parts = [safetensors.numpy.load_file(file) for file in files]
        return {name: value for part in parts for name, value in part.items()}

    ours, theirs = read(left), read(right)
    return (
        bool(ours)
        and ours.keys() == theirs.keys()
        and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    )


def compare(left: pathlib.Path, right: pathlib.Path) -> dict[str, Any]:
    """How the logs and the weights of two finished runs differ."""
    ours, theirs = log_of(left), log_of(right)
    losses = [(a["loss"], b["loss"]) for a, b in zip(ours, theirs, strict=False)]
    return {
        "steps": len(ours),
        "same_log": ours == theirs,
        "same_weights": same_weights(left, right),
        "largest_loss_difference": max(abs(a - b) / abs(b) for a, b in losses),
    }


def check(folder: pathlib.Path, processes: int) -> bool:
    """All of the above in a folder; whether everything was as it has to be."""
    folder = folder.absolute() / f"kill-{time.time():.0f}"
    whole, broken = folder / "whole", folder / "broken"
    finish(whole, processes)
    codes = kill(broken, processes)
    fine = codes[-1] == -signal.SIGKILL and all(c not in (0, 75) for c in codes[:-1])
    saved = sorted(int(p.name) for p in (broken / "checkpoints").glob("[0-9]*"))
    line = {"killed": f"1 of {processes}", "exit_codes": codes, "saved_steps": saved}
    print(json.dumps(line | {"fine": fine, "said": last_words(broken, 0)}), flush=True)
    same, one, again = folder / "same", folder / "one", folder / "again"
    many_exact, one_exact = folder / "many-float32", folder / "one-float32"
    for workdir in (same, one, again, many_exact, one_exact):
        shutil.copytree(broken, workdir)
    finish(same, processes)
    finish(many_exact, processes, exact=True)
    finish(one_exact, 1, exact=True)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for _ in pool.map(
            lambda run: finish(run[1], 1, run[0]), enumerate((one, again))
        ):
            pass
    for left, right, is_same in (
        (same, whole, True),
        (again, one, True),
        (one_exact, many_exact, False),
    ):
        found = compare(left, right)
        good = found["steps"] == STEPS and found["largest_loss_difference"] < 1e-4
        if is_same:
            good = (
                found["steps"] == STEPS and found["same_log"] and found["same_weights"]
            )
        fine = fine and good
        line = {"resumed": left.name, "beside": right.name, "fine": good}
        print(json.dumps(line | found), flush=True)
    return fine


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    sys.exit(not check(options.folder, options.processes))


if __name__ == "__main__":
    main()
