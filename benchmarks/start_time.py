"""Seconds from the command to the first step's end, by part, at a second start too.

    python benchmarks/whole_run.py make DIR
    python benchmarks/start_time.py DIR [--task=sft] [--flag=model.scan_layers=true]

It trains for some steps, with a cache of its own: from nothing, then with what that
run compiled and traced (run/kept_programs.py); with --between also with compiled
programs alone, in between. Each telling line of the log is printed with the seconds
from the start of the process, then the last loss and the rate of the later steps:
programs that were kept must not be slower, and give the same.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

LONGEST, EXAMPLES = 1024, 8
# Lines that say where the time goes.
TELLING = re.compile(
    r"loading|data  |batch  |attention: auto|compiled the train step|first step took"
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
        f"--training.max_steps={options.steps}",
        "--training.logging_steps=20",
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
    last = ""
    for line in process.stdout:
        now = time.perf_counter() - began
        last = line.strip() or last
        if TELLING.search(line):
            print(f"  {now:6.1f} s  {line.strip()[:110]}", flush=True)
    process.wait()
    records = workdir / "metrics.jsonl"
    if process.returncode or not records.exists():
        print(f"  it ended with {process.returncode}: {last[:200]}")
        return
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    rates = [r["tokens_per_sec"] for r in lines if "tokens_per_sec" in r][1:]
    middle = statistics.median(rates) if rates else float("nan")
    loss = next(r["loss"] for r in reversed(lines) if "loss" in r)
    told = f"median of {len(rates)} rates: {middle:.0f} tokens/s; last loss {loss}"
    print(f"  {told}", flush=True)


def start_named(name: str, options: argparse.Namespace, cache: pathlib.Path) -> None:
    print(f"{options.task}, {name}:", flush=True)
    start(options, cache.parent / name, cache)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--task", choices=["sft", "dpo"], default="sft")
    # More than 64, or only the shapes of these steps would be compiled.
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--between", action="store_true", help="see above")
    parser.add_argument("--flag", action="append", default=[], help="a key of ours")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        cache = pathlib.Path(scratch, "cache")
        start_named("from nothing", options, cache)
        if options.between:
            for folder in cache.rglob("traced"):
                shutil.rmtree(folder)
            start_named("compiled, not traced", options, cache)
        start_named("compiled and traced", options, cache)


if __name__ == "__main__":
    main()
