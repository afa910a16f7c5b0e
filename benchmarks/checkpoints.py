"""Saving and restoring a train state, beside torch.save and torch.load of the same.

    python benchmarks/checkpoints.py [--gb 1] [--repeats 3] [--folder DIR]
    python benchmarks/checkpoints.py --save-only [--gb 8] [--repeats 9] [--seconds 80]

Weights and both of Adam's moments in float32, in the shapes of a decoder whose layers
are stacked. Every repeat runs each part once, one after the other, so that a busy
machine hurts all alike. For each part: the median of wall seconds, the least, and the
least of the process's CPU seconds, which other programs disturb less. Checksums: the
same save with hashing switched off gives their price. By PYTHONPATH the same script
measures an earlier version, without that part.

`--save-only` measures that price alone: pairs of saves, one with and one without
hashing, whose order alternates, and the differences within the pairs. No pair begins
after `--seconds`. It leaves out torch and all restoring, which need the state three
times over in memory.
"""

import argparse
import importlib.util
import os
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax
import numpy as np

from jaxtrain.run.checkpoint import CheckpointManager, checksums

LAYERS = 8


def make_state(gib: float) -> dict[str, jax.Array]:
    """Random leaves of `gib` GiB: matrices stacked by layer, an embedding, norms."""
    # Weights and two moments; 12 d^2 a layer and 32,000 d for the embedding.
    each = gib * 2**30 / 4 / 3
    width = next(
        d for d in range(64, 1 << 14, 64) if LAYERS * 12 * d * d + 32_000 * d > each
    )
    shapes = {
        "embedding": (32_000, width),
        "attention": (LAYERS, 4, width, width),
        "mlp": (LAYERS, 8, width, width),
        "norm": (LAYERS, width),
    }
    # Numbers that repeat after 64 MiB: nothing here compresses.
    numbers = np.random.default_rng(0).standard_normal(2**24, np.float32)
    return {
        f"{part}.{name}": jax.device_put(np.resize(numbers, shape))
        for part in ("trainable", "mu", "nu")
        for name, shape in shapes.items()
    }


Seconds = dict[str, tuple[float, float]]  # wall and CPU


def measure_checksums(
    state: dict[str, jax.Array], folder: pathlib.Path, repeats: int, seconds: float
) -> None:
    """Print what hashing adds to a save, by pairs of saves with and without it."""
    ends, hash_pieces = time.perf_counter() + seconds, checksums.hash_pieces
    hashing: list[float] = []

    def timed(pieces: Any) -> Any:
        started = time.perf_counter()
        found = hash_pieces(pieces)
        hashing.append(time.perf_counter() - started)
        return found

    def save(hash_: Callable[[Any], Any]) -> float:
        with mock.patch.object(checksums, "hash_pieces", hash_):
            started = time.perf_counter()
            with CheckpointManager(folder / "save") as manager:
                manager.save(1, state)
                manager.wait()
            taken = time.perf_counter() - started
        shutil.rmtree(folder / "save")
        os.sync()
        return taken

    def none(pieces: Any) -> Any:
        return {}

    save(timed)  # threads and buffers are made
    hashing.clear()
    pairs: list[tuple[float, float]] = []
    while len(pairs) < repeats and (len(pairs) < 2 or time.perf_counter() < ends):
        order = (timed, none) if len(pairs) % 2 == 0 else (none, timed)
        taken = {hash_: save(hash_) for hash_ in order}
        pairs.append((taken[timed], taken[none]))
    with_, without = map(statistics.median, zip(*pairs, strict=True))
    more = sorted(one - other for one, other in pairs)
    low, _, high = statistics.quantiles(more, n=4)
    size = sum(leaf.nbytes for leaf in state.values())
    share = 100 * statistics.median(more) / without
    print(f"{len(pairs)} pairs; median save {with_:.3f} s, without {without:.3f} s")
    print(
        f"median difference within pairs {statistics.median(more):+.3f} s"
        f" (half of them between {low:+.3f} and {high:+.3f}): {share:+.2f}% of a save"
    )
    alone = statistics.median(hashing)
    print(f"hashing, beside the writing: {alone:.3f} s, {size / alone / 1e9:.1f} GB/s")


def measure(state: dict[str, jax.Array], folder: pathlib.Path) -> Seconds:
    """Wall and CPU seconds of each part, once."""
    import torch

    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    tensors = {
        name: torch.from_numpy(np.asarray(leaf).copy()) for name, leaf in state.items()
    }
    file = folder / "state.pt"
    seconds: Seconds = {}

    def clock(name: str, call: Callable[[], object]) -> None:
        started, cpu = time.perf_counter(), time.process_time()
        call()
        wall = time.perf_counter() - started
        seconds[name] = (wall, time.process_time() - cpu)

    def save(name: str) -> None:
        with CheckpointManager(folder / name) as manager:
            clock(f"{name}: blocked", lambda: manager.save(1, state))
            clock(f"{name}: background", manager.wait)

    def torch_save() -> None:
        torch.save(tensors, file)
        with file.open("rb") as opened:
            os.fsync(opened.fileno())

    def restore(name: str) -> None:
        with CheckpointManager(folder / "save") as manager:
            clock(name, lambda: jax.block_until_ready(manager.restore(shapes).state))

    clock("torch.save and fsync", torch_save)
    save("save")
    restore("restore")
    clock("torch.load", lambda: torch.load(file))
    if importlib.util.find_spec("jaxtrain.run.saved_record"):
        package = "jaxtrain.run.checkpoint"
        with mock.patch(f"{package}.checksums.hash_pieces", lambda pieces: {}):
            save("save without checksums")
        with mock.patch(f"{package}.manager._verify", lambda *_: None):
            restore("restore without checksums")
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return seconds


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--gb", type=float, default=1.0, help="GiB of state")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=pathlib.Path, help="a disk to write to")
    parser.add_argument("--save-only", action="store_true")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    options = parser.parse_args()
    state = make_state(options.gb)
    size = sum(leaf.nbytes for leaf in state.values())
    print(f"{size / 2**30:.2f} GiB, {len(state)} leaves, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = pathlib.Path(folder)
        if options.save_only:
            measure_checksums(state, path, options.repeats, options.seconds)
            return
        runs = [measure(state, path) for _ in range(options.repeats)]
    for name in runs[0]:
        walls, cpus = zip(*(run[name] for run in runs), strict=True)
        shown = f"{statistics.median(walls):6.2f} s   least {min(walls):6.2f} s"
        print(f"{name:36} {shown}   CPU {min(cpus):6.2f} s")
    print("load average", *os.getloadavg())


if __name__ == "__main__":
    main()
