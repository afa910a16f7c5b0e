"""How long a run takes to its first step, with and without compiled programs on disk.

    python benchmarks/start_up.py --shape=0.5b

It runs `jaxtrain train from_scratch` as a user does, twice in fresh work directories
that share one cache, and takes the time from the start of the process to the end of the
first step. Beside it: whether the rates that the run logs are those of a clock outside,
the times of its records.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from step_cases import SHAPES

STEPS = 40
LOGGED = 10


def train(
    shape: str, workdir: pathlib.Path, cache: pathlib.Path, length: int
) -> tuple[float, float]:
    """Run once; the wall time when it started, and seconds until it had ended."""
    sizes = {"model_type": "qwen2"} | SHAPES[shape]
    sizes["vocab_size"] = max(sizes["vocab_size"], 2048)  # the embedded tokenizer's
    flags = [f"--model.architecture.{name}={value}" for name, value in sizes.items()]
    started = time.time()
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "jaxtrain", "train", "from_scratch"),
            *flags,
            f"--workdir={workdir}",
            f"--data.max_length={length}",
            f"--training.max_steps={STEPS}",
            f"--training.logging_steps={LOGGED}",
            "--training.per_device_train_batch_size=8",
            "--training.bf16=true",
            "--training.eval_steps=0",
            "--training.eval_on_start=false",
            "--training.save_steps=0",
            "--training.save_final_model=false",
        ],
        env=os.environ | {"JAXTRAIN_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    print(finished.stdout, finished.stderr, file=sys.stderr)
    finished.check_returncode()
    return started, time.time() - started


def read(workdir: pathlib.Path, started: float) -> dict[str, float]:
    """Seconds to the first record, and the logged rates beside the records' times."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if "tokens_per_sec" in line]
    first, second, last = records[0], records[1], records[-1]
    # Writing the first record opens files and device libraries, so count from the next.
    seconds = last["time"] - second["time"]
    logged = [record["tokens_per_sec"] for record in records[2:]]
    return {
        "first_record_secs": first["time"] - started,
        "first_logged": first["tokens_per_sec"],
        "logged": len(logged) / sum(1 / rate for rate in logged),
        "outside": (last["num_tokens"] - second["num_tokens"]) / seconds,
    }


def main() -> None:
    """Print both starts, and the rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="smoke")
    parser.add_argument("--length", type=int, default=2048)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = pathlib.Path(folder, "cache")
        for name in ("cold", "warm"):
            workdir = pathlib.Path(folder, name)
            started, whole = train(options.shape, workdir, cache, options.length)
            found = read(workdir, started) | {"whole_run_secs": whole}
            shown = ", ".join(f"{key} {value:.4g}" for key, value in found.items())
            print(f"{options.shape} {name}: {shown}", flush=True)


if __name__ == "__main__":
    main()
