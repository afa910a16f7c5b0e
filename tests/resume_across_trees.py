"""Whether one version of the package trains on exactly where another one stopped.

    python tests/resume_across_trees.py OLD_TREE NEW_TREE [--types sft,lora]

For each training type OLD trains to the end in one go. What is left of that run if it
is stopped in the middle is copied twice; OLD trains one copy to the end and NEW the
other. Then the three exported models, logs and last checkpoints must be the same bit by
bit: a table says so for each, and the exit status is 1 on any difference.

Every run is a process of its own, with the tree as its PYTHONPATH and this interpreter.
It imports of the tree only what `checkpoint_runs.py` does.
"""

import argparse
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

TESTS = pathlib.Path(__file__).resolve().parent
TYPES = ("from_scratch", "sft", "lora", "dpo")
# Endings of the names of metrics that the clock and the machine say (runs.py).
TIMES = ("time", "_per_sec", "_secs", "_share", "_gib", "mfu")


def drive(tree: str, training_type: str, workdir: str) -> None:
    """In a process of `tree`: train, or train on, to the end."""
    sys.path.insert(1, str(TESTS))
    from checkpoint_runs import make_config, train

    import jaxtrain

    source = pathlib.Path(str(jaxtrain.__file__)).resolve()
    if not source.is_relative_to(pathlib.Path(tree).resolve()):
        raise SystemExit(f"jaxtrain is {source}, which is not in {tree}")
    train(make_config(training_type), pathlib.Path(workdir))


def run(tree: pathlib.Path, training_type: str, workdir: pathlib.Path) -> str:
    """`drive` as a subprocess; what it printed.

    Raises:
        RuntimeError: it failed; says what it printed last.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, __file__, "--drive", tree, training_type, workdir],
        env=environment,
        cwd=workdir.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{training_type} in {tree} failed:\n{done.stdout[-3000:]}")
    return done.stdout


def stop_at(step: int, finished: pathlib.Path, stopped: pathlib.Path) -> None:
    """Copy of a finished run what there is of it when it stops behind `step`."""
    saved = pathlib.Path("checkpoints") / str(step)
    shutil.copytree(finished / saved, stopped / saved)
    # With the lines behind the step, which a resumed run must drop.
    shutil.copy(finished / "metrics.jsonl", stopped)


def read_records(workdir: pathlib.Path) -> dict[str, Any]:
    """The log's values by line and name, without what the clock says."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {
        f"line {number} {name}": value
        for number, line in enumerate(lines, start=1)
        for name, value in json.loads(line).items()
        if not name.endswith(TIMES)
    }


def read_weights(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of what was exported, by file and name."""
    import safetensors.numpy

    return {
        f"{path.relative_to(workdir)} {name}": tensor
        for path in sorted(workdir.rglob("*.safetensors"))
        for name, tensor in safetensors.numpy.load_file(path).items()
    }


def read_checkpoint(workdir: pathlib.Path, step: int) -> dict[str, Any]:
    """The leaves of a checkpoint, read by Orbax alone, its layout and data position."""
    import orbax.checkpoint as ocp

    folder = workdir / "checkpoints" / str(step)
    with ocp.PyTreeCheckpointer() as reader:
        names = reader.metadata(folder / "state").item_metadata.tree
        leaves = reader.restore(
            folder / "state",
            restore_args={
                name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names
            },
        )
    record = json.loads((folder / "record" / "metadata").read_text())
    return leaves | {
        f"{part} of it": record[part] for part in ("layout", "data_states")
    }


def same(left: Any, right: Any) -> bool:
    """Whether two values are the same, arrays by dtype, shape and bytes."""
    if not isinstance(left, np.ndarray) or not isinstance(right, np.ndarray):
        return type(left) is type(right) and left == right
    alike = (left.dtype, left.shape) == (right.dtype, right.shape)
    return alike and left.tobytes() == right.tobytes()


def differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """The names under which the two do not hold the same."""
    names = left.keys() | right.keys()
    return sorted(
        name
        for name in names
        if name not in left or name not in right or not same(left[name], right[name])
    )


def compare(one: pathlib.Path, other: pathlib.Path) -> dict[str, tuple[int, list[str]]]:
    """Of each kind of result: how many values there are, and which differ."""
    steps = [int(path.name) for path in (one / "checkpoints").glob("[0-9]*")]
    found = {}
    for kind, left, right in (
        ("exported weights", read_weights(one), read_weights(other)),
        ("log", read_records(one), read_records(other)),
        ("checkpoint", *(read_checkpoint(run, max(steps)) for run in (one, other))),
    ):
        if not left:
            raise ValueError(f"{one} holds no {kind}: there is nothing to compare")
        found[kind] = len(left), differences(left, right)
    return found


def check(
    training_type: str, old: pathlib.Path, new: pathlib.Path, folder: pathlib.Path
) -> bool:
    """Run one training type; print its lines of the table; whether all is the same."""
    whole, old_copy, new_copy = (folder / name for name in ("whole", "old", "new"))
    started = time.perf_counter()
    whole.mkdir(parents=True)
    run(old, training_type, whole)
    steps = sorted(int(path.name) for path in (whole / "checkpoints").glob("[0-9]*"))
    for tree, copy in ((old, old_copy), (new, new_copy)):
        stop_at(steps[0], whole, copy)
        printed = run(tree, training_type, copy)
        if f"step {steps[0]}/" in printed or f"step {steps[0] + 1}/" not in printed:
            raise RuntimeError(f"{tree} did not go on from step {steps[0]}:\n{printed}")
    is_same = True
    for title, left, right in (
        ("old whole, old resumed", whole, old_copy),
        ("old resumed, new resumed", old_copy, new_copy),
    ):
        for kind, (count, wrong) in compare(left, right).items():
            verdict = "same" if not wrong else f"{len(wrong)} DIFFER: {wrong[:4]}"
            print(f"{training_type:13} {title:25} {kind:17} {count:4} {verdict}")
            is_same = is_same and not wrong
    print(f"{training_type:13} took {time.perf_counter() - started:.0f} s", flush=True)
    return is_same


def main() -> int:
    """The exit status."""
    if sys.argv[1:2] == ["--drive"]:
        drive(*sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("old_tree", type=pathlib.Path)
    parser.add_argument("new_tree", type=pathlib.Path)
    parser.add_argument("--types", default=",".join(TYPES))
    arguments = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reads one part alone
    old, new = arguments.old_tree.resolve(), arguments.new_tree.resolve()
    with tempfile.TemporaryDirectory() as folder:
        results = [
            check(name, old, new, pathlib.Path(folder) / name)
            for name in arguments.types.split(",")
        ]
    print("all the same" if all(results) else "THERE ARE DIFFERENCES")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
