"""Seconds from the command to the first step's end, by part, at a second start too.

    python benchmarks/whole_run.py make DIR
    python benchmarks/start_time.py DIR [--task=sft] [--flag=model.scan_layers=true]

It trains for some steps, three times with a cache of their own: from nothing; with
compiled programs but none of the traced ones (run/kept_programs.py); with both. Each
line of the log is printed with the seconds from the start of the process, then the rate
of the later steps: programs that were kept must not be slower.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

LONGEST, EXAMPLES = 1024, 8
# Lines that say where the time goes.
TELLING = re.compile(
    r"loading|prepared|tokens|attention: auto|compiled the train step|first step took"
    r"|not kept|WARNING|ERROR"
)


def start(
    options: argparse.Namespace, workdir: pathlib.Path, cache: pathlib.Path
) -> None:
    """Run once; print the telling lines of its log, and the rate at its end."""
    flags = [
        f"--workdir={workdir}",
        f"--model.name_or_path={options.folder / 'model'}",
        f"--model.tokenizer_name_or_path={options.folder / 'tokenizer'}",
        f"--data.train={options.folder / f'{options.task}.jsonl'}",
        f"--data.max_length={LONGEST}",
        f"--training.per_device_train_batch_size={EXAMPLES}",
        "--training.num_train_epochs=1",
        "--training.logging_steps=10",
        "--training.bf16=true",
        "--training.eval_steps=0",
        "--training.save_steps=0",
        "--training.save_final_model=false",
        *(f"--{flag}" for flag in options.flag),
    ]
    command = [sys.executable, "-m", "jaxtrain", "train", options.task, *flags]
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=os.environ | {"JAXTRAIN_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    last, begun = "", 0.0
    for line in process.stdout:
        now = time.perf_counter() - began
        last = line.strip() or last
        if TELLING.search(line):
            print(f"  {now:6.1f} s  {line.strip()[:110]}", flush=True)
        if "first step took" in line:
            begun = time.perf_counter()
        if begun and time.perf_counter() - begun > options.secs:
            process.terminate()  # it leaves at its next step
            begun = 0.0
    process.wait()
    records = workdir / "metrics.jsonl"
    if not records.exists():
        print(f"  it ended with {process.returncode}: {last[:200]}")
        return
    lines = map(json.loads, records.read_text().splitlines())
    rates = sorted(r["tokens_per_sec"] for r in lines if "tokens_per_sec" in r)
    middle = rates[len(rates) // 2] if rates else float("nan")
    print(f"  median of {len(rates)} rates: {middle:.0f} tokens/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--task", choices=["sft", "dpo"], default="sft")
    parser.add_argument("--secs", type=float, default=15, help="to train, each time")
    parser.add_argument("--flag", action="append", default=[], help="a key of ours")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        cache = pathlib.Path(scratch, "cache")
        for number, name in enumerate(
            ("from nothing", "compiled, not traced", "compiled and traced")
        ):
            print(f"{options.task}, {name}:", flush=True)
            if number == 1:
                for folder in cache.rglob("traced"):
                    shutil.rmtree(folder)
            start(options, pathlib.Path(scratch, f"out{number}"), cache)


if __name__ == "__main__":
    main()
