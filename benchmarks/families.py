"""Whether each family's published sizes fit: the real step, compiled for absent chips.

    PYTHONPATH=. python benchmarks/families.py --topology=v5p:2x2x2 --out families.jsonl

Every model of configs/shapes on one slice, rows of 4096 tokens, one to a device,
gradient checkpointing, parameters and state split over all devices (`mesh.fsdp`). All
weights are trained where float32 weights, gradients and AdamW's moments (16 bytes each)
take at most 0.8 of the memory, else adapters of rank 16 on a bfloat16 base. Adds a line
of JSON a model to `--out`, leaving out those already there, and prints the table of
docs/scaling.md. For TPUs it needs jax[tpu], for GPUs jax[cuda13], and none of them.
"""

import argparse
import concurrent.futures
import json
import logging
import multiprocessing
import pathlib
import time
from typing import Any

from jaxtrain import aot  # first: it tells jax that no TPU is to be looked for
from jaxtrain.aot.report import CHIPS
from jaxtrain.config import default_config
from jaxtrain.models.hf_config import load_config

GIB = 2.0**30
SHAPES = pathlib.Path(__file__).resolve().parent.parent / "configs" / "shapes"
LENGTH = 4096
_STATE_BYTES = 16  # a weight, its gradient and two moments, in float32
_SHARE = 0.8  # of the memory, for that; activations need the rest


def measure(shape: str, topology: str) -> dict[str, Any]:
    """Compile one model's step; what the table needs of it."""
    start = time.perf_counter()
    logging.disable(logging.WARNING)
    devices = aot.describe_devices(topology)
    weights = load_config(SHAPES / shape).num_params()
    config = default_config()
    config.model.name_or_path = str(SHAPES / shape)
    config.data.max_length = LENGTH
    config.mesh.fsdp, config.mesh.data = len(devices), 1
    training = config.training
    training.gradient_checkpointing = True
    training.per_device_train_batch_size = 1
    training.gradient_accumulation_steps = 1
    memory = CHIPS[devices[0].device_kind].memory_bytes * len(devices)
    training.training_type = "sft"
    if weights * _STATE_BYTES > _SHARE * memory:
        training.training_type = "lora"
    line = {
        "shape": shape,
        "topology": topology,
        "weights": weights,
        "training": training.training_type,
    }
    try:
        report = aot.compile_for(config, devices, topology)
    except Exception as error:  # the other models shall still be compiled
        return line | {"error": f"{type(error).__name__}: {error}"[:300]}
    return line | {
        "fits": report.fits,
        "refusal": (report.refusal or "")[:300],
        "gib": report.device_bytes / GIB,
        "share": report.device_bytes / report.chip.memory_bytes,
        "mfu": report.mfu if report.fits else 0.0,
        "wall_secs": round(time.perf_counter() - start, 1),
    }


def format_row(line: dict[str, Any]) -> str:
    head = f"| {line['shape']} | {line['weights'] / 1e9:.3g} | {line['training']} |"
    if "error" in line:
        return f"{head} not compiled: {line['error']} | | |"
    fits = "yes" if line["fits"] else "no"
    bound = f"{line['mfu']:.0%}" if line["fits"] else ""
    return f"{head} {line['gib']:.1f} ({line['share']:.0%}) | {fits} | {bound} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--only", default="", help="names, parted by commas")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    found = {}
    if options.out.exists():
        lines = map(json.loads, options.out.read_text("utf-8").splitlines())
        found = {
            line["shape"]: line
            for line in lines
            if line["topology"] == options.topology
        }
    wanted = (
        options.only.split(",")
        if options.only
        else sorted(path.name for path in SHAPES.iterdir() if path.is_dir())
    )
    with concurrent.futures.ProcessPoolExecutor(
        options.processes,
        mp_context=multiprocessing.get_context("spawn"),
        max_tasks_per_child=1,
    ) as pool:
        waiting = {
            pool.submit(measure, shape, options.topology)
            for shape in wanted
            if shape not in found
        }
        for done in concurrent.futures.as_completed(waiting):
            line = done.result()
            found[line["shape"]] = line
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    print("| model | weights, 10⁹ | run | GiB a device | fits | bound on MFU |")
    print("|---|---|---|---|---|---|")
    for shape in wanted:
        print(format_row(found[shape]))


if __name__ == "__main__":
    main()
